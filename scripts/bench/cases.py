"""What the benchmarks measure: attention shapes of models, default grids, suites by name."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One layer's attention of a model."""

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    learned_sinks: bool = False


WORKLOADS = {
    "llama-3-8b": Workload(q_heads=32, kv_heads=8, head_dim=128),
    "llama-3-70b": Workload(q_heads=64, kv_heads=8, head_dim=128),
    "mistral-7b": Workload(q_heads=32, kv_heads=8, head_dim=128, window=4096),
    "gpt-oss-20b": Workload(q_heads=64, kv_heads=8, head_dim=64, learned_sinks=True),
    "gpt-oss-20b-window": Workload(
        q_heads=64, kv_heads=8, head_dim=64, window=128, learned_sinks=True
    ),
    "gemma-3-12b": Workload(q_heads=16, kv_heads=8, head_dim=256),
    "gemma-3-12b-window": Workload(q_heads=16, kv_heads=8, head_dim=256, window=1024),
    "smollm2": Workload(q_heads=9, kv_heads=3, head_dim=64),
    "tiny": Workload(q_heads=8, kv_heads=2, head_dim=64, window=80, learned_sinks=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement of attention."""

    workload: str
    batch: int  # sequences side by side
    context: int  # tokens of each
    codec: str
    ragged: bool = False  # lengths between an eighth and eleven eighths of the context
    layers: int | None = None  # of the pools; None: enough that no cache holds them

    @property
    def group(self) -> str:
        """Everything but the codec, as text."""
        ragged = " ragged" if self.ragged else ""
        layers = "" if self.layers is None else f" {self.layers} layers"
        return f"{self.workload} b{self.batch} {short(self.context)}{ragged}{layers}"


def short(tokens: int) -> str:
    """A number of tokens as text, "8k" for 8192."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What a benchmark measures by default: every combination of these."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]  # tokens
    codecs: tuple[str, ...] = ("exact",)
    chunks: tuple[int, ...] = ()  # prompt tokens of one step

    def cases(self, *, ragged: bool = False) -> list[Case]:
        """The grid as a list, codecs of a case together, exact first."""
        return [
            Case(workload=model, batch=batch, context=context, codec=codec, ragged=ragged)
            for model in self.models
            for batch in self.batches
            for context in self.contexts
            for codec in sorted(dict.fromkeys(self.codecs), key=lambda name: name != "exact")
        ]


# By command. Models are names of WORKLOADS where one layer is measured, of
# `models.random_weights.SHAPES` in "step" and "prefill", and of checkpoints in the last two.
GRIDS = {
    "decode": Grid(
        models=tuple(name for name in WORKLOADS if name != "tiny"),
        batches=(1, 8, 64),
        contexts=(1024, 8192, 32768, 131072),
        codecs=("exact", "4bit_nc"),
    ),
    "segments": Grid(
        models=("llama-3-8b",), batches=(64,), contexts=(8192,), codecs=("4bit_nc", "tq4")
    ),
    "tune": Grid(models=("llama-3-8b",), batches=(64,), contexts=(8192,)),
    "step": Grid(
        models=("llama3-8b",),
        batches=(1, 8, 64),
        contexts=(8192,),
        codecs=("exact", "fp8_e4m3", "tq4"),
    ),
    "prefill": Grid(
        models=("llama3-8b",),
        batches=(1,),
        contexts=(8192,),
        codecs=("exact", "tq4"),
        chunks=(256, 1024),
    ),
    "codecs": Grid(
        models=("smollm2",),
        batches=(1,),
        contexts=(1024,),
        codecs=("4bit_nc", "tq4", "tq3", "int8"),
    ),
    "generate": Grid(models=("smollm2",), batches=(1, 8), contexts=(128,)),
}


def _cases(workload: str, batch: int, context: int, codecs: tuple[str, ...], **options):
    return [
        Case(workload=workload, batch=batch, context=context, codec=codec, **options)
        for codec in codecs
    ]


_BOTH = ("exact", "4bit_nc")
_CODED = ("4bit_nc", "tq4", "tq3", "3bit_nc", "fp8_e4m3", "int8", "k8v4", "tq2")

SUITES = {
    # The table of decode attention in docs/performance.md.
    "published": (
        *_cases("llama-3-8b", 64, 8192, ("exact", *_CODED)),
        *_cases("llama-3-8b", 1, 131072, _BOTH),
        *_cases("llama-3-8b", 64, 8192, _BOTH, ragged=True),
        *_cases("llama-3-8b", 8, 65536, ("exact",)),
        *_cases("gpt-oss-20b-window", 128, 8192, ("exact",)),
        *_cases("gpt-oss-20b-window", 128, 32768, ("exact",)),
        *_cases("gpt-oss-20b-window", 128, 131072, ("exact",)),
        *_cases("gpt-oss-20b", 128, 8192, _BOTH),
        *_cases("mistral-7b", 64, 32768, _BOTH),
        # Arrays beyond 4 GiB, where kernels count with 64-bit offsets.
        *_cases("llama-3-8b", 64, 8192, ("exact",), layers=5),
        *_cases("llama-3-8b", 64, 8192, ("4bit_nc",), layers=18),
    )
}
