"""What is read as a whole: the HTML report, the README's results, a run explained."""
