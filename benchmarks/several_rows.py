"""Rows of `several_gpus.py`: what is to be known about 2, 4 or 8 GPUs, by which commands, and which goals their figures have.

Rows stand in the order of what they decide: whether results are right, the goals of speed, then the rest. A command's first
word is `python`, `torchrun`, `meshloom` or `pytest`; paths are from the root of the repository.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import several_figures as figures
from several_figures import Numbers

LENGTHS = "magi,byted,github,commoncrawl,wikipedia"
QUIET = ["trainer.eval_every=0", "checkpoint.every=0", "trainer.sample_prompt=null", "logging.progress=false"]
TINY = [
    "model.dim=64", "model.layers=4", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=128", "model.vocabulary=null",
    "data.vocabulary=512", "data.seq_len=64", "precision=fp32", "trainer.compile=false", "trainer.float8=none",
]  # fmt: skip
"""Overrides that make a recipe small enough for processes on two cores."""
TINY_MIXTURE = ["model.head_dim=16", "model.experts.ffn_dim=32"]
KEEP_GATHERED = "--parallelism.fsdp_reshard_after_forward never"
FLOAT8 = (
    "--model.converters quantize.linear.float8 --quantize.linear.float8.enable_fsdp_float8_all_gather "
    "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp --quantize.linear.float8.filter_fqns output"
)
OURS, TITAN, NEWER = "meshloom", "torchtitan", "torchtitan 0.3.0"
"""Names of the systems in `beside_torchtitan.py`'s lines."""
PUBLISHED = {"llama_8b": 10_682, "llama_8b_float8": 14_451, "qwen3_30b": 12_040}
"""Row → tokens/s/GPU that others have published for 8 H100."""


@dataclass(frozen=True)
class Command:
    """One command of a row. label: goes before the names of its numbers, where a row has several."""

    words: Sequence[str]
    read: Callable[[str], Numbers] = figures.nothing
    label: str = ""


@dataclass(frozen=True)
class Goal:
    """A figure of a row, and what it should be.

    number  of the row's numbers; over: one that it is divided by, of another row as `row/number`; "": by `by`
    least   the figure should be at least this; most: at most; neither: it is only told
    """

    name: str
    number: str
    over: str = ""
    by: float = 1.0
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Row:
    """A question, and the commands that answer it. seconds: that they take on the GPUs, about, with what they compile."""

    name: str
    question: str
    seconds: float
    commands: Sequence[Command]
    goals: Sequence[Goal] = field(default_factory=list[Goal])


@dataclass(frozen=True)
class Place:
    """The machine that rows run on, and their sizes.

    output  for files of rows
    tiny    small sizes, on processes of the CPU
    newer   folder of torchtitan 0.3.0
    """

    gpus: int
    output: Path
    tiny: bool = False
    newer: str = ""

    def folder(self, row: str) -> Path:
        """Return the folder of a row's files."""
        return self.output / f"{self.gpus}{'-tiny' if self.tiny else ''}" / row

    def torchrun(self, *words: str) -> list[str]:
        """Return a command on as many processes as there are GPUs."""
        return ["torchrun", "--standalone", "--nproc-per-node", str(self.gpus), *words]

    def train(self, output: Path, *words: str, gpus: int = 0) -> list[str]:
        """Return a `meshloom train`."""
        return ["meshloom", "train", *words, f"launch.nproc={gpus or self.gpus}", f"output_dir={output}"]

    def small(self, words: Sequence[str], tiny: Sequence[str]) -> list[str]:
        """Return words of a command, and behind them those that make it small where that is wanted."""
        return [*words, *(tiny if self.tiny else ())]

    def beside(self, row: str, model: str, batch: int, ours: str = "", theirs: str = "", **settings: object) -> Command:
        """Return a `beside_torchtitan.py`, and how it is read."""
        mixture = TINY_MIXTURE if model.startswith(("moe", "qwen3_30b")) else []
        said: dict[str, object] = {"model": model, "batch": batch, "gpus": self.gpus, "steps": 16, "rounds": 1}
        said |= {"logs": self.folder(row), "cache": self.output / "cache"}
        # 0.3.0 is given no layout but data and expert parallelism, and has the shapes of these.
        newer = self.newer and model in ("1B", "moe_a", "moe_b") and "shared" not in settings
        said |= {**({"newer": self.newer} if newer else {}), **settings}
        said |= {"steps": 2, "systems": "ours"} if self.tiny else {}
        said |= {"ours": shlex.join(self.small(ours.split(), [*TINY, *mixture])), "theirs": theirs}
        words = [f"{key}={value}" for key, value in said.items()]
        return Command(["python", "benchmarks/beside_torchtitan.py", *words], figures.beside)


def all_rows(place: Place) -> list[Row]:
    """Return the rows of so many GPUs, those that decide most first."""
    parts = (_results, _dense, _hybrid, _experts, _axes, _faults, _saves, _layouts)
    return [row for part in parts for row in part(place)]


def _peers(memory: float | None = 0.75, least: float | None = 1.15) -> list[Goal]:
    return [
        Goal("tokens/s/GPU", OURS),
        Goal("– over torchtitan 0.2.2", OURS, TITAN, least=least),
        Goal("– GiB held over torchtitan's", f"{OURS} GiB", f"{TITAN} GiB", most=memory),
    ]


def _results(place: Place) -> Iterator[Row]:
    """Make the rows that tell if results over NCCL are right."""
    gpus = place.gpus
    words = ["pytest", "tests/parallel/test_gpu_two.py", "-p", "no:cacheprovider"]
    goals = [Goal("tests passed", "passed", least=30), Goal("failed", "failed", most=0)]
    yield Row("gpu_tests", "Do layouts over NCCL train as one GPU does?", 150, [Command(words, figures.tests)], goals)

    first = ["trainer.steps=20", "data.vocabulary=1024", *QUIET]
    mixture = place.small(["recipe=moe_tiny", *first], [*TINY[:5], "data.seq_len=64", "trainer.steps=3"])
    folder = place.folder("losses_experts")
    dealt = {f"zero{zero}": [f"parallel.zero={zero}", f"parallel.ep={gpus}"] for zero in (1, 3)}
    commands = [Command(place.train(folder / "one", *mixture, gpus=1))]
    commands += [Command(place.train(folder / name, *mixture, *words)) for name, words in dealt.items()]
    commands += [_compared(folder, ["one", *dealt])]
    yield Row("losses_experts", "Do experts dealt to ranks train as on one GPU?", 120, commands, _same(1e-3))

    folder = place.folder("losses_hybrid")
    corpus = [f"output={folder / 'corpus.jsonl'}", f"tokens={50_000 if place.tiny else 1_000_000}", "lengths=magi"]
    text = [
        *("recipe=quickstart", "data=jsonl", f"data.input={folder / 'corpus.jsonl'}", "data.tokenizer=bytes"),
        *("data.document_mask=true", "data.packing=bestfit", "data.seq_len=4096", "batch.samples=16", "batch.micro=1"),
        *("trainer.steps=20", *QUIET),
    ]
    text = place.small(text, [*TINY[:5], "data.seq_len=512", "batch.samples=4", "trainer.steps=3"])
    hybrid = ["parallel.zero=1", "parallel.hdp=greedy", f"parallel.hdp_tokens={256 if place.tiny else 2048}"]
    commands = [
        Command(["python", "benchmarks/long_tail_corpus.py", *corpus]),
        Command(place.train(folder / "one", *text, gpus=1)),
        Command(place.train(folder / "hybrid", *text, *hybrid)),
        _compared(folder, ["one", "hybrid"]),
    ]
    yield Row("losses_hybrid", "Do documents shared by ranks train as on one GPU?", 100, commands, _same(1e-3))


def _compared(folder: Path, runs: Sequence[str], *more: str) -> Command:
    return Command(["python", "benchmarks/compare_runs.py", *(str(folder / run) for run in runs), *more], figures.apart)


def _same(most: float) -> list[Goal]:
    told = "largest relative difference of a loss"
    return [Goal(f"{told}, 10 steps", "first 10", most=most), Goal(f"{told}, all steps", "all")]


def _dense(place: Place) -> Iterator[Row]:
    """Llama beside torchtitan."""
    whole = f"--activation_checkpoint.mode none {KEEP_GATHERED}"
    cold = {"cache": ""}  # seconds to the first loss are those of empty caches
    one = place.beside("llama_1b_one", "1B", 4, theirs="--activation_checkpoint.mode none", gpus=1, **cold)
    yield Row("llama_1b_one", "What does one GPU of these do?", 75, [one], _peers())
    scaling = [Goal(f"– {place.gpus} GPUs over one", OURS, f"llama_1b_one/{OURS}", least=0.98)]
    scaling += [Goal("– the same of torchtitan", TITAN, f"llama_1b_one/{TITAN}")]
    scaling += [Goal("– first loss over torchtitan's", f"{OURS} first loss", f"{TITAN} first loss", most=0.5)]
    yield Row(
        "llama_1b", "Are data-parallel GPUs as fast as one?", 80,
        [place.beside("llama_1b", "1B", 4, theirs=whole, profile=1, **cold)], [*_peers(), *scaling],
    )  # fmt: skip
    for name, more, converters in (("llama_8b", "", ""), ("llama_8b_float8", " trainer.float8=tensorwise", FLOAT8)):
        theirs = f"--activation_checkpoint.mode selective {converters}".strip()
        command = place.beside(name, "8B", 2, f"trainer.activation=none{more}", theirs)
        question = f"How fast is 8B in {'float8' if more else 'bf16'}?"
        yield Row(name, question, 120, [command], [*_peers(), *_published(name, place)])
    command = place.beside("llama_3b", "3B", 2, theirs="--activation_checkpoint.mode none")
    yield Row("llama_3b", "How fast is 3B?", 90, [command], _peers())

    folder = place.folder("forked")
    words = ["recipe=llama_1b", f"batch.samples={4 * place.gpus}", "batch.micro=4", "trainer.activation=none", *QUIET]
    words = place.small([*words, "trainer.tokens=null", "trainer.steps=3", "schedule.warmup=2"], TINY)
    rank = place.torchrun("-m", "meshloom.launch.rank", *words, f"output_dir={folder / 'torchrun'}")
    commands = [
        Command(place.train(folder / "first", *words), label="first "),  # fills the caches
        Command(place.train(folder / "forked", *words), label="forked "),
        Command(rank, label="torchrun "),
    ]
    goals = [Goal("s of a run with ranks forked", "forked seconds")]
    goals += [Goal("– over ranks that torchrun starts", "forked seconds", "torchrun seconds", most=1.0)]
    yield Row("forked", "Can ranks that use GPUs be forked, and is it quicker?", 110, commands, goals)


def _published(row: str, place: Place) -> list[Goal]:
    found = PUBLISHED[row]
    return [Goal(f"– over {found:,}, published for 8 H100", OURS, by=found)] if place.gpus == 8 else []


def _hybrid(place: Place) -> Iterator[Row]:
    """Documents of five tables of lengths, dealt in each way: hybrid, static context parallelism, whole rows on each GPU."""
    ways = {"hybrid": "hybrid", "context": "context", **({"context2": "context2"} if place.gpus > 2 else {}), "whole": "whole"}
    work = ["part=ranks", f"lengths={LENGTHS}", "rows=131072", f"tokens={131_072 * place.gpus}", "capacity=65536", "steps=2"]
    small = ["lengths=magi,github", "rows=1024", f"tokens={1024 * place.gpus}", "capacity=512", "steps=1", "model=tiny"]
    work = place.small([*work, "warmup=1"], [*small, "vocabulary=512", "compile=0"])
    for way in ways:
        words = place.torchrun("benchmarks/packed_documents.py", *work, f"ways={way}")
        goals = [Goal(f"{name}, tokens/s/GPU", name) for name in LENGTHS.split(",")]
        goals += [Goal("GiB that PyTorch's allocator does not hold", "other GiB")]
        if way == "hybrid":
            least = {2: 1.1, 8: 1.5}.get(place.gpus)
            over = [(f"cp {place.gpus}", "context", least)]
            over += [("cp 2", "context2", least)] if place.gpus > 2 else []
            over += [("whole rows, recomputed", "whole", 1.4 if place.gpus == 2 else None)]
            for name, (told, other, wanted) in product(LENGTHS.split(","), over):
                goals.append(Goal(f"{name} over {told}", name, f"documents_{other}/{name}", least=wanted))
        question = f"Packed documents, {way}: how fast, with how much of NCCL's memory?"
        yield Row(f"documents_{way}", question, 180, [Command(words, figures.ranks)], goals)


def _experts(place: Place) -> Iterator[Row]:
    """Mixtures by expert-parallel size and ZeRO stage, beside torchtitan's same layouts."""
    sizes = dict.fromkeys([1, place.gpus, *(ep for ep in (2, 4) if ep < place.gpus)])
    for zero, model, ep in product((1, 3), ("moe_a", "moe_b"), sizes):
        name = f"{model}_zero{zero}_ep{ep}"
        theirs = f"--activation_checkpoint.mode none{f' {KEEP_GATHERED}' if zero == 1 else ''}"
        command = place.beside(name, model, 2, f"parallel.zero={zero} trainer.activation=none", theirs, ep=ep, profile=1)
        goals = _peers(0.75, 1.15 if model == "moe_a" else 1.6)
        goals += [Goal("– over torchtitan 0.3.0", OURS, NEWER, least=1.15)]
        goals += [Goal("– over ep 1", OURS, f"{model}_zero{zero}_ep1/{OURS}")] if ep > 1 else []
        question = f"Mixture {model[-1].upper()}, ZeRO-{zero}, ep {ep}: rate, memory, and in its profile what is exchanged"
        yield Row(name, question, 120, [command], goals)
    for model in ("moe_a", "moe_b"):
        name = f"{model}_forced"
        command = place.beside(
            name, model, 2, "parallel.zero=1 trainer.activation=none", f"--activation_checkpoint.mode none {KEEP_GATHERED}",
            ep=place.gpus, balance="forced",
        )  # fmt: skip
        yield Row(name, "The same with as many tokens for every expert, ep over all GPUs", 150, [command], _peers())
    if place.gpus == 8:
        command = place.beside(
            "qwen3_30b", "qwen3_30b_a3b", 1, "parallel.zero=3 trainer.activation=none", "--activation_checkpoint.mode full",
            ep=8, balance="forced", systems="ours,titan",
        )  # fmt: skip
        yield Row("qwen3_30b", "How fast is Qwen3 30B-A3B?", 240, [command], [*_peers(), *_published("qwen3_30b", place)])


def _axes(place: Place) -> Iterator[Row]:
    """Llama 1B with tensor, pipeline and context parallelism over two GPUs each."""
    # torchtitan mixes precisions where FSDP or context parallelism shards the weights, and nowhere else: under tensor or
    # pipeline parallelism alone it computes in fp32, says so, and runs out of memory with this work. It gets bf16 weights
    # there, gradients and Adam's moments too, which is less to hold and to move than our fp32 masters.
    bf16 = "--training.dtype bfloat16 " if place.gpus == 2 else ""
    none = "--activation_checkpoint.mode none --parallelism."
    staged = f"{bf16}{none}pipeline_parallel_degree 2 --parallelism.pipeline_parallel_microbatch_size 1"
    staged += " --parallelism.pipeline_parallel_schedule "
    context = f"{none}context_parallel_degree 2"
    stages = "batch.micro=1 parallel.pp=2 parallel.schedule="
    axes = {
        "tp2": (4, "parallel.tp=2", f"{bf16}{none}tensor_parallel_degree 2", 1),
        "pp2_1f1b": (8, f"{stages}1f1b", f"{staged}1F1B", 1),
        "pp2_interleaved": (8, f"{stages}interleaved", f"{staged}Interleaved1F1B", 1),
        "pp2_zbv": (8, f"{stages}zbv", f"{staged}ZBVZeroBubble", 0),
        "cp2_ring": (4, "parallel.cp=2", context, 1),
        "cp2_ulysses": (4, "parallel.cp=2 parallel.cp_kind=ulysses", context, 1),
    }
    for name, (batch, ours, theirs, compiled) in axes.items():
        words = f"trainer.activation=none {ours}"
        command = place.beside(name, "1B", batch, words, theirs, shared=2, compile=compiled, profile=int(name == "cp2_ring"))
        question = f"1B, {name.replace('_', ', ')}{'' if compiled else ', not compiled'}: how fast?"
        goals = [*_peers(), Goal("– over one GPU's", OURS, f"llama_1b_one/{OURS}")]
        yield Row(name, question, 80, [command], goals)


def _faults(place: Place) -> Iterator[Row]:
    """Ranks with GPUs that are stopped, killed, or whose weights are changed."""
    precision = "fp64" if place.tiny else "bf16"
    layout = ["parallel.zero=3", f"precision={precision}", "trainer.compile=false"]
    phases = ["exchange"] if place.tiny else ["forward", "exchange", "save"]
    words = ["stop", "kill", "--phases", *phases, "--ranks", str(place.gpus), "--layout", *layout]
    goals = [Goal("wrong or missing names", "wrong names", most=0), Goal("late ends", "late ends", most=0)]
    goals += [Goal("collectives that flight recorders named", "collectives", least=1)]
    command = Command(["python", "benchmarks/run_faults.py", *words], figures.faults)
    yield Row("stop_and_kill", "SIGSTOP, SIGKILL: is the right rank named, are flight recorders read?", 180, [command], goals)
    for name, kind, told in (("flips", "flip_weight", "A flipped bit"), ("kills", "kill", "SIGKILL and a restart")):
        schedules = ["--random", "1", "--kinds", kind] if place.tiny else ["--every-phase", "1", "--kind", kind]
        out = ["--out", str(place.folder(name) / "runs.jsonl")]
        goals = [Goal("runs in which it was noticed", "noticed", "runs")]
        goals += [Goal("with wrong names", "wrong names", most=0), Goal("hung", "hung", most=0)]
        goals += [Goal("largest relative difference of a loss", "apart", most=1e-9 if kind == "kill" else None)]
        command = Command(["python", "benchmarks/under_fire.py", *schedules, *out], figures.fire)
        yield Row(name, f"{told} in whole runs on two GPUs: noticed, and the same losses?", 240, [command], goals)


def _saves(place: Place) -> Iterator[Row]:
    """Checkpoints: what they cost, and whether other numbers of GPUs go on from them; losses on each number."""
    folder = place.folder("saves")
    small = ["--steps", "3", "--every", "2", "--warm-up", "2", "--raw-gib", "0.1", "--model", "tiny"]
    words = ["--folder", str(folder), *place.small(["--steps", "10"], small)]
    command = Command(place.torchrun("benchmarks/checkpoint_throughput.py", *words), figures.saves)
    goals = [Goal("% of a step lost, to the disk", "disk %", most=0.5), Goal("– and into memory", "memory %", most=0.5)]
    goals += [Goal("s of the longest stall", "stall", most=0.005)]
    yield Row("saves", "What does a save every 5 steps cost, with the memory tier?", 200, [command], goals)

    folder = place.folder("resume")
    counts = {2: (2, 1, 2), 4: (4, 3, 1, 2), 8: (8, 4, 3, 1)}[place.gpus]
    each = 2 if place.tiny else 10
    words = ["recipe=quickstart", "schedule=constant", f"schedule.warmup={each}", "optim.lr=1e-3", f"checkpoint.every={each}"]
    words += ["trainer.eval_every=0", "trainer.sample_prompt=null", "logging.progress=false", "resume=auto"]
    words = place.small([*words, "data.vocabulary=1024"], [*TINY[:5], "data.seq_len=64"])
    commands = [Command(place.train(folder / "stays", *words, f"trainer.steps={each * len(counts)}"))]
    for number, count in enumerate(counts, 1):
        commands.append(Command(place.train(folder / "moves", *words, f"trainer.steps={each * number}", gpus=count)))
    commands += [_compared(folder, ["stays", "moves"])]
    question = f"Do runs go on between {', '.join(map(str, counts))} GPUs as if they had stayed?"
    yield Row("resume", question, 150, commands, _same(1e-3))

    folder = place.folder("curves")
    counts = [count for count in (1, 2, 4, 8) if count <= place.gpus]
    words = ["recipe=quickstart", "trainer.steps=500", *QUIET, "data.vocabulary=1024"]
    words = place.small(words, [*TINY[:5], "data.seq_len=64", "trainer.steps=4"])
    commands = [Command(place.train(folder / str(count), *words, gpus=count)) for count in counts]
    commands += [_compared(folder, [str(count) for count in counts], "--draw", str(folder / "curves.png"))]
    question = "Losses of 500 steps on each number of GPUs, on one picture"
    yield Row("curves", question, 60 + 40 * len(counts), commands, _same(1e-3))


def _layouts(place: Place) -> Iterator[Row]:
    """Layouts of Llama 8B, predicted by a plan with this machine's rates, and measured."""
    gpus = place.gpus
    cluster = f"cluster=severalx{gpus}"
    words = ["recipe=llama_8b", f"batch.samples={2 * gpus}", "batch.micro=1", "trainer.activation=none", "trainer.tokens=null"]
    words = place.small([*words, "trainer.steps=12", "schedule.warmup=2", *QUIET], [*TINY, "trainer.steps=5"])
    calibrate = place.torchrun("-m", "meshloom.launch.cli", "calibrate", "--as", "several", *(["--cpu"] if place.tiny else []))
    best = ["meshloom", "plan", *words, f"launch.nproc={gpus}", cluster, "--best", "8"]
    question = "This machine's rates, and the layouts that a plan ranks first with them"
    yield Row("calibrate", question, 180, [Command(calibrate), Command(best)])
    layouts = ["", "tp=2", "pp=2", "cp=2"] + (["tp=2 pp=2", "tp=2 cp=2", "tp=4"] if gpus > 2 else [])
    for layout in layouts:
        name = f"layout_{layout.replace('=', '').replace(' ', '_') or 'zero3'}"
        axes = [f"parallel.{axis}" for axis in layout.split()]
        run = place.folder(name) / "run"
        against = ["meshloom", "plan", "--against", str(run), cluster, "--json"]
        commands = [Command(place.train(run, *words, *axes)), Command(against, figures.against)]
        goals = [Goal("tokens/s/GPU", "measured"), Goal("– over ZeRO-3's alone", "measured", "layout_zero3/measured")]
        goals += [Goal("– predicted over measured", "predicted", "measured", least=0.95, most=1.05)]
        goals += [Goal("GiB, predicted over measured", "predicted GiB", "measured GiB")]
        yield Row(name, f"8B with {layout or 'ZeRO-3 alone'}: predicted beside measured", 100, commands, goals)
