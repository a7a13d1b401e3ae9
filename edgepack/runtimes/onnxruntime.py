"""onnxruntime: open a checked model on the execution provider that was asked for, or not at all.

onnxruntime falls back silently: asked for a provider it does not have, it warns and runs on the CPU. Here the provider
must be in the installed package and must be the first that the session reports, else the session is not made. Threads
are set, never guessed, and stand in `settings` with everything else that decides speed. Only ever used inside a worker
process. Knows nothing of targets, texts or measurements.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import MissingError, StepError
from edgepack.onnx.check import Facts, check_model
from edgepack.onnx.graph import Port

MINIMUM_VERSION = (1, 31)  # what the checker's limits were asked of; 1.26 followed links of sparse external data
INSTALL_HINT = "pip install 'onnxruntime>=1.31'"
CPU = "CPUExecutionProvider"

# Threads that wait sleep (onnxruntime core/session/onnxruntime_session_options_config_keys.h); for a session that works
# in turns with another engine in one process.
NO_SPINNING: Mapping[str, str] = {"session.intra_op.allow_spinning": "0"}

_ERROR_LEVEL = 3  # onnxruntime's log severity: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal
_NATIVE = "onnxruntime.capi.onnxruntime_pybind11_state"

Array = npt.NDArray[Any]


@functools.cache
def bindings() -> ModuleType:
    """The checked `onnxruntime` module, its log reduced to errors and its telemetry off.

    Raises:
        MissingError: Not installed, or too old.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hardware it looks for and does not find
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            raise MissingError(f"onnxruntime can't be used: {error}", hint=INSTALL_HINT) from None
    found = tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if found < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise MissingError(
            f"onnxruntime {onnxruntime.__version__} is too old: {wanted} or newer is needed", hint=INSTALL_HINT
        )
    onnxruntime.set_default_logger_severity(_ERROR_LEVEL)
    onnxruntime.disable_telemetry_events()
    module: ModuleType = onnxruntime
    return module


def providers() -> list[str]:
    """Execution providers of the installed package, in its order of preference."""
    return [str(name) for name in bindings().get_available_providers()]


def native_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: classes of its own without a common root, and what its bindings turn into Python's."""
    native = bindings().capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, OSError)


def require_provider(provider: str) -> None:
    """See that a provider can be asked for.

    Raises:
        MissingError: The installed onnxruntime does not have it; lists those it has.
    """
    available = providers()
    if provider not in available:
        raise MissingError(
            f"execution provider {provider} is not in the installed onnxruntime; it has {', '.join(available)}",
            hint="Install the onnxruntime package made for it, or measure on the device.",
        )


class Session:
    """A loaded model on one execution provider.

    Args:
        path: The `.onnx` file; checked (see `edgepack.onnx.check`) before onnxruntime sees it.
        provider: Execution provider that must run it.
        threads: Threads of one operator; operators run one after the other.
        provider_options: Handed to the provider.
        config: Entries of onnxruntime's session configuration, `session.disable_prepacking` and the like.

    Raises:
        InputRefused: The file is unsafe or damaged.
        MissingError: The provider is not there, or onnxruntime put another one in its place.
        StepError: onnxruntime can't load the model; the message carries its reason.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        provider: str = CPU,
        threads: int,
        provider_options: Mapping[str, str] | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.facts: Facts = check_model(self.path, libraries=False)
        api: Any = bindings()
        require_provider(provider)
        options = api.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = api.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ERROR_LEVEL
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        asked = [(provider, dict(provider_options or {}))]
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its word on providers it lacks: we say it ourselves
                self._session = api.InferenceSession(str(self.path), options, providers=asked)
        except native_errors() as error:
            raise StepError(f"{self.path.name}: onnxruntime can't load it: {reason(error)}") from error
        self.load_ms = 1000 * (time.perf_counter() - started)
        self.providers: list[str] = list(self._session.get_providers())
        if self.providers[:1] != [provider]:
            raise MissingError(
                f"{self.path.name}: asked for {provider}, onnxruntime runs it on {', '.join(self.providers)}",
                hint="The provider's own libraries may be missing on this machine.",
            )
        self.settings: dict[str, Any] = {
            "provider": provider,
            "provider_options": dict(provider_options or {}),
            "intra_op_num_threads": threads,
            "inter_op_num_threads": 1,
            "execution_mode": "sequential",
            "graph_optimization": str(options.graph_optimization_level).rsplit(".", 1)[-1],
            "config": dict(config or {}),
        }

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What has to be given."""
        return self.facts.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What comes back."""
        return self.facts.outputs

    def run(self, feeds: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        """Compute.

        Args:
            feeds: Input name -> array of that input's type and shape; inputs that the model does not have are left out.
            names: Outputs wanted; None for all.

        Returns:
            Output name -> array.

        Raises:
            StepError: An input is missing, or onnxruntime fails.
        """
        wanted = [port.name for port in self.outputs] if names is None else list(names)
        missing = [port.name for port in self.inputs if port.name not in feeds]
        if missing:
            raise StepError(f"{self.path.name}: nothing was given for its input {missing[0]}")
        given = {port.name: feeds[port.name] for port in self.inputs}
        try:
            found = self._session.run(wanted, given)
        except native_errors() as error:
            raise StepError(f"{self.path.name}: onnxruntime can't run it: {reason(error)}") from error
        return {name: np.asarray(value) for name, value in zip(wanted, found, strict=True)}


def reason(error: Exception) -> str:
    """The text of an onnxruntime error in one line, without its prefix and the path of its own source file."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"^/\S+?:\d+ .*?\) ", "", text)[:400] or type(error).__name__


def toolchain() -> dict[str, Any]:
    """What runs the model here: version, build and providers of onnxruntime."""
    api: Any = bindings()
    return {
        "name": "onnxruntime",
        "version": str(api.__version__),
        "build": " ".join(str(api.get_build_info()).split()),
        "providers": providers(),
    }
