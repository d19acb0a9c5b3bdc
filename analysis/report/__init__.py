"""Results as text and pages: the HTML report, the README's results, a run explained."""
