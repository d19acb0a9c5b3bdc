"""What users type by mistake, for run.py: (words, words that the one line of the answer holds)."""

from __future__ import annotations

ON = ("tasks=embedded_chart", "limit=1", "latency=off")
TASK = {
    "task": "mine", "dataset_path": "json", "dataset_kwargs": "{data_files: {test: questions.jsonl}}",
    "test_split": "test", "output_type": "generate_until", "doc_to_text": '"{{question}}"', "doc_to_target": "answer",
    "metric_list": "[{metric: exact_match, aggregation: mean, higher_is_better: true}]",
}  # fmt: skip

# dial=value -> what the line must hold; each is refused before anything is loaded
VALUES = {
    "ratio=half": ["ratio", "number"], "ratio=1.5": ["ratio", "1.5"], "ratio=-0.1": ["ratio", "-0.1"],
    "ratio=nan": ["ratio", "nan"], "ratio=inf": ["ratio", "inf"], "ratio=null": ["ratio"], "ratio=": ["ratio"],
    "ratio=0,5": ["ratio", "-m"], "ratio=[0.5]": ["ratio"], "stages=0": ["stages"], "stages=40": ["40 stages"],
    "stages=2.5": ["stages"], "stages=-1": ["stages"], "layers=[3,12]": ["layer 12"], "layers=[6,3]": ["rise"],
    "layers=3": ["layers", "list"], "layers=[a]": ["layers"], "layers=[-1]": ["-1"], "layers=[3,3]": ["rise"],
    "seed=-1": ["seed", "-1"], "seed=1.5": ["seed"], "seed=x": ["seed"], "seed=99999999999": ["seed"],
    "limit=0": ["limit", "from 1"], "limit=-3": ["limit"], "limit=all": ["limit"], "limit=1.5": ["limit"],
    "batch_size=0": ["batch_size"], "batch_size=two": ["batch_size"], "dtype=float7": ["float7", "bfloat16"],
    "dtype=16": ["dtype"], "device=gpu": ["gpu"], "device=cuda:77": ["cuda:77"], "device=''": ["device"],
    "device=cuda:x": ["cuda:x"], "device=-1": ["device"], "attn_implementation=fast": ["fast", "sdpa"],
    "max_new_tokens=0": ["max_new_tokens"], "max_new_tokens=-5": ["max_new_tokens"],
    "positions=gaps": ["positions", "compact"], "twin=5": ["twin"], "twin=maybe": ["twin"],
    "results=''": ["results"], "results=' '": ["results"], "experiment=a/b": ["experiment"],
    "experiment=..": ["experiment"], "experiment=''": ["experiment"], "force=maybe": ["force"],
    "plan=maybe": ["plan"], "retry=all": ["retry", "failed"], "tasks=3": ["tasks", "list"], "tasks=[[a]]": ["tasks"],
    "tasks=embedded_chrat": ["embedded_chrat", "embedded_chart"], "tasks={a: 1}": ["tasks"],
    "tasks=[embedded_chart,nope]": ["nope"], "tasks=''": ["task"], "task_folders=mine": ["task_folders", "list"],
    "task_folders=[/no/where]": ["/no/where"], "task_folders=[3]": ["3"],
    "method=pyramid": ["pyramid", "pyramiddrop"], "method=": ["method"], "method=../method/fastv": ["method"],
    "method=[fastv]": ["method"], "method.foo=1": ["foo"], "method._target_=builtins.dict": ["builtins.dict"],
    "method._target_=no.such.Thing": ["no.such.Thing"], "method._target_=3": ["_target_"],
    "method.observe=7": ["observe"], "schedule._target_=builtins.dict": ["builtins.dict"],
    "schedule._target_=nope": ["nope"], "model=lava": ["lava", "embedded"], "model=folder": ["model.name"],
    "model.name=a/b": ["model.name"], "model.path=/no/where": ["/no/where"], "model.path=''": ["model.path"],
    "model.weights=some": ["weights", "pretrained"], "model.prompt=foo": ["foo", "vicuna_v1"],
    "model.image_mode=foo": ["foo", "pad"], "model.text_tokens=-99": ["text_tokens"],
    "model.visual_tokens=0": ["visual_tokens"], "model.visual_tokens=many": ["visual_tokens"],
    "model.revision=''": ["revision"], "model.foo=1": ["foo"], "model.path=package://no.such/folder": ["no.such"],
    "latency=fast": ["fast", "quick"], "latency.warmup=x": ["warmup"], "latency.pairs=2.5": ["pairs"],
    "latency.pairs=-1": ["pairs"], "latency.memory=maybe": ["memory"], "latency.new_tokens=2": ["new_tokens"],
    "latency.foo=1": ["foo"], "budget=lots": ["lots"], "budget=flops": ["flops"], "budget=flops:x": ["flops"],
    "budget=flops:2": ["flops"], "budget=avg_tokens:0": ["avg_tokens"], "budget=avg_tokens:99999": ["avg_tokens"],
    "budget=kv:-1": ["kv"], "ratoi=0.5": ["ratoi", "did you mean ratio"], "foo": ["foo"], "=5": ["5"],
    "ratio==0.5": ["ratio"], "experiments=dmeo": ["dmeo", "demo"], "+ratio.x=1": ["ratio"], "~method": ["method"],
    "hydra.foo=1": ["foo"], "ratio=${nope}": ["nope"],
}  # fmt: skip

# what goes together or not
TOGETHER = {
    ("budget=flops:0.6", "ratio=0.5"): ["leave out ratio"], ("method=fastv", "layers=[2,4]"): ["one boundary"],
    ("method=fastv", "layers=[0]"): ["boundary 0"], ("method=pool", "layers=[0,2]"): ["boundary"],
    ("method=fastv", "method=random"): ["twice"], ("method=none", "method.observe=1"): ["method"],
    ("model=folder", "model.name=x", "model.path=."): ["config.json"],
    ("model=folder", "model.name=x", "model.path=no/such"): ["no/such"],
    ("-m", "method=fastv,pyramd"): ["pyramd"], ("-m", "ratio=0.5,half"): ["half"],
    ("-m", "method=fastv", "latency.pairs=y,x"): ["pairs"], ("force=3",): ["force", "true or false"],
    ("-m", "plan=0,2"): ["plan"], ("-m", "ratio=0.5", "ratio"): ["ratio"],
}  # fmt: skip

# a line of a task's YAML -> another one
TASKS = {
    "output_type": ("output_type: shout", ["shout"]), "doc_to_target": ("doc_to_target: anwser", ["anwser", "answer"]),
    "metric_list": ("metric_list: [{metric: exact_match, aggregation: meen}]", ["meen", "mean"]),
    "dataset_kwargs": ("dataset_kwargs: {data_files: {test: nowhere.jsonl}}", ["nowhere.jsonl"]),
    "test_split": ("test_split: tset", ["tset"]), "doc_to_text": ('doc_to_text: "{{question"', ["mine"]),
    "task": ("task: ../mine", ["mine"]),
}  # fmt: skip
EXTRA = {
    "include: mine.yaml": ["includes itself"], "generation_kwargs: {max_new_tokns: 3}": ["max_new_tokns"],
    "generation_kwargs: 3": ["generation_kwargs"], "generation_kwargs: {temperature: hot}": ["temperature"],
    "include: nowhere.yaml": ["nowhere.yaml"], "{{{": ["YAML"], "generation_kwargs: {min_new_tokens: 99}": ["min_new"],
    "tag: [a": ["YAML"], "\t- x": ["YAML"],
}  # fmt: skip
