"""Notes on benchmarks and models for readers of published numbers: which were sampled, judged, or use other data.
Sources: the authors' evaluation code and model cards, listed in docs/tasks.md."""

from __future__ import annotations

# by the start of a task's name, the longest that fits
TASKS = {
    "gqa": "published by equality after lower case: official_accuracy; lmms-eval's exact_match drops punctuation, too",
    "llava_in_the_wild": "published numbers are a judge's (GPT-4): they depend on its version",
    "mlvu": "choices alone; the published open answers are a judge's",
    "mmbench_cn": "scored by rule; official numbers read what no rule reads by a judge",
    "mmbench": "circular, by rule; officially a judge reads what no rule reads (circular_accuracy: it is wrong here; "
    "gpt_eval_score: lmms-eval looks further for a letter); single_pass_accuracy: first rows",
    "mme": "perception; the papers' totals are mme_total_score",
    "mmvet": "published numbers are a judge's (GPT-4): they depend on its version",
    "pope": "published F1 is the mean over three categories, an answer without no or not being yes: official_f1",
    "refcoco_rec_val": "mixes the published validation split (UNC's) with Google's, as lmms-eval's data do",
    "refcocog_rec_val": "mixes the published validation split (UMD's) with Google's, as lmms-eval's data do",
    "scienceqa": "published by three patterns: official_accuracy",
    "textvqa_val_ocr": "with reference OCR tokens in the prompt, as the published LLaVA-1.5 numbers have it",
    "textvqa": "without reference OCR tokens; the published LLaVA-1.5 numbers have them in the prompt: textvqa_val_ocr",
    "vizwiz": "validation split; published numbers are of the test server's",
    "vqav2": "validation split; published numbers are of the test server's (test-dev)",
}
# by the beginning of a model's name
MODELS = {
    "qwen3_vl": "official numbers of Qwen3-VL were sampled (temperature 0.7, top_p 0.8, top_k 20, presence penalty "
    "1.5); answers here are the likeliest ones, unless a task says otherwise",
}


def of_task(task: str) -> str | None:
    """The note on a task."""
    return _longest(TASKS, task)


def of_model(model: str) -> str | None:
    """The note on a model."""
    return _longest(MODELS, model)


def _longest(notes: dict[str, str], name: str) -> str | None:
    fitting = [start for start in notes if name.startswith(start)]
    return notes[max(fitting, key=len)] if fitting else None
