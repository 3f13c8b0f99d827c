"""What a user can choose about XAttnRes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from nnunet_xattnres.common.errors import XAttnResError, suggestion

FUSIONS = ("replace", "residual")
BACKENDS = ("auto", "reference", "streaming", "native", "triton")


@dataclass(frozen=True)
class XAttnResConfig:
    """Stage-level XAttnRes: which stages read from the history pool, and how the mixture enters a stage.

    skip_connections: keep nnU-Net's skip connections beside the attention, or let the attention replace them.
    read_in_encoder, read_in_decoder: where stages read from the pool.
    fusion: `"replace"`, as in the paper: the mixture over pool and input replaces the stage's input. `"residual"`: the
        mixture over the pool alone, times a gate per channel that is zero at initialisation, is added to the input.
    backend: how the attention is computed: `"auto"`, `"reference"`, `"streaming"`, `"native"` (on a CPU) or `"triton"`
        (on a GPU). All compute the same.

    Raises `XAttnResError` for a value that does not exist.
    """

    skip_connections: bool = True
    read_in_encoder: bool = True
    read_in_decoder: bool = True
    fusion: str = "replace"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_flags(self, "skip_connections", "read_in_encoder", "read_in_decoder")
        _check_choice(self, "fusion", FUSIONS)
        _check_choice(self, "backend", BACKENDS)

    @classmethod
    def of_planned_network(cls) -> "XAttnResConfig":
        """The config of the network that nnU-Net planned."""
        return cls(read_in_encoder=False, read_in_decoder=False)

    @property
    def is_planned_network(self) -> bool:
        """Whether the network is the one that nnU-Net planned, with nothing added and nothing removed."""
        return self.skip_connections and not self.read_in_encoder and not self.read_in_decoder

    @property
    def has_attention(self) -> bool:
        """Whether there is anything for a backend to compute."""
        return self.read_in_encoder or self.read_in_decoder

    def architecture(self) -> dict[str, Any]:
        """The fields that decide what a trained network computes, for the record in its checkpoint."""
        return _all_but_backend(self)


@dataclass(frozen=True)
class BlockXAttnResConfig:
    """Block-level XAttnRes: attention among the blocks of a stage (ISAR) and in place of a skip connection (DKVMR).

    isar_in_encoder, isar_in_decoder: where blocks read from the earlier blocks of their stage. This has an effect only
        in stages of three or more blocks, which only the encoders of ResEnc plans have. With `bank_includes_input` two
        blocks are enough.
    bank_includes_input: the stage's input opens the bank that its blocks read from (not in the authors' code).
    kv_ratio: the number of channels of DKVMR's keys, as a multiple of the memory's, from 0.001 to 8.
    temperature: divides ISAR's scores, from 0.001 to 1000.
    backend: as in `XAttnResConfig`. Here, `"native"` and `"triton"` are `"streaming"`, because they compute stage level
        only.

    Raises `XAttnResError` for a value that does not exist.
    """

    isar_in_encoder: bool = False
    isar_in_decoder: bool = True
    bank_includes_input: bool = False
    kv_ratio: float = 0.5
    temperature: float = 1.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_flags(self, "isar_in_encoder", "isar_in_decoder", "bank_includes_input")
        _check_number(self, "kv_ratio", 0.001, 8)
        _check_number(self, "temperature", 0.001, 1000)
        _check_choice(self, "backend", BACKENDS)

    @property
    def has_attention(self) -> bool:
        """Whether there is anything for a backend to compute: DKVMR always."""
        return True

    @property
    def is_planned_network(self) -> bool:
        """False: something is always added."""
        return False

    def architecture(self) -> dict[str, Any]:
        """The fields that decide what a trained network computes, for the record in its checkpoint."""
        return _all_but_backend(self)


Config = XAttnResConfig | BlockXAttnResConfig
Kind = TypeVar("Kind", bound=Config)


def config_from_fields(kind: type[Kind], values: Mapping[str, Any] | None) -> Kind:
    """The config with these fields, as plans hold them. Fields left out have their defaults.

    Raises `XAttnResError` for a field or a value that does not exist.
    """
    known = [field.name for field in fields(kind)]
    if not isinstance(values, Mapping | None):
        raise XAttnResError(f"xattnres in the plans must hold {', '.join(known)}, not {values!r}")
    for name in values or {}:
        if name not in known:
            near = suggestion(name, known) or f"there are {', '.join(known)}"
            raise XAttnResError(f"xattnres in the plans has {name}, which {kind.__name__} does not have: {near}")
    return kind(**(values or {}))


def _check_flags(config: Config, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise XAttnResError(f"{_field(config, name)} must be True or False, not {getattr(config, name)!r}")


def _check_choice(config: Config, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        listed = ", ".join(choices)
        raise XAttnResError(f"{_field(config, name)} must be one of {listed}, not {getattr(config, name)!r}")


def _check_number(config: Config, name: str, lowest: float, highest: float) -> None:
    value = getattr(config, name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
        raise XAttnResError(f"{_field(config, name)} must be a number from {lowest:g} to {highest:g}, not {value!r}")


def _field(config: Config, name: str) -> str:
    return f"{type(config).__name__}.{name}"


def _all_but_backend(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "backend"}
