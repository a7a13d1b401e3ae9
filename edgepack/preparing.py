"""What happens to a model before it is quantized: it is pruned, then healed by what it was pruned from.

    original -> [fewer tokens] -> [fewer layers, neurons, heads] -> [healed]

Every step gives a folder of the store and rows of evidence. A smaller vocabulary comes first and on its own: what is
left of the original in those tokens is what the rest is healed by and measured against, since models with other
tokenizers can't be compared token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import UsageError

if TYPE_CHECKING:
    from edgepack.heal.command import Options
    from edgepack.prune.request import Request
    from edgepack.source import Source
    from edgepack.workshop import Workshop


@dataclass(frozen=True)
class Wish:
    """What a user wants done before quantization.

    Args:
        prune: What to leave out; None leaves all in.
        heal: Tokens to heal on; None does not heal.
        options: How to heal.
    """

    prune: Request | None = None
    heal: int | None = None
    options: Options | None = None


@dataclass(frozen=True)
class Prepared:
    """A model on its way to be quantized.

    Args:
        original: What the user named, hashed.
        reference: What the artifact is measured against: the original, or what is left of it in fewer tokens.
        source: What is quantized.
        pruning: Documents of pruning (`edgepack-prune.json`), in their order.
        healing: The document of healing (`edgepack-heal.json`).
    """

    original: Source
    reference: Source
    source: Source
    pruning: tuple[Mapping[str, Any], ...] = ()
    healing: Mapping[str, Any] | None = None

    @property
    def changed(self) -> bool:
        """Something was done."""
        return bool(self.pruning)


def untouched(source: Source) -> Prepared:
    """A model that nothing is done to.

    Args:
        source: Hashed.
    """
    return Prepared(source, source, source)


def parse(prune: str | None, heal: str | None, data: str | None, *, auto: bool) -> Wish:
    """What is to be done before quantization, from the words of the command line.

    Args:
        prune: `depth=2,ffn=1024`.
        heal: Tokens.
        data: Text to heal on.
        auto: What to prune is decided later.

    Raises:
        UsageError: Words that can't be read, or contradict each other.
    """
    from edgepack.heal.budget import parse_tokens
    from edgepack.heal.command import Options
    from edgepack.prune.request import parse as parse_prune

    if auto and prune is not None:
        raise UsageError("--auto chooses what to prune, and --prune says it", hint="Give one of them.")
    if data is not None and heal is None and not auto:
        raise UsageError("--data is text to heal on, and --heal is not given", hint="Add --heal 2M.")
    wish = Wish(
        None if prune is None else parse_prune(prune),
        None if heal is None else parse_tokens(heal, "--heal"),
        Options(data=data),
    )
    if not auto:
        check(wish)
    return wish


def check(wish: Wish) -> None:
    """Refuse wishes that contradict themselves, before anything is read.

    Raises:
        UsageError: Healing without pruning, or of a vocabulary alone.
    """
    if wish.heal is None:
        return
    if wish.prune is None:
        raise UsageError(
            "--heal repairs what pruning costs, and nothing is pruned",
            hint="Add --prune, or heal a pruned folder: edgepack heal PRUNED --teacher MODEL.",
        )
    if replace(wish.prune, vocabulary=()).empty:
        raise UsageError(
            "--heal: the text keeps the tokens it had when only the vocabulary is pruned: there is nothing to heal",
            hint="Leave --heal out.",
        )


def prepare(
    shop: Workshop, original: Source, wish: Wish, *, calibration: str | None = None, evaluation: Path | None = None
) -> Prepared:
    """Prune and heal; each step is taken from the store where it is there.

    Args:
        shop: Where results are kept.
        original: The model, hashed.
        wish: What to do.
        calibration: Text that choices are made on.
        evaluation: Text that results are measured on.

    Raises:
        UsageError, InputRefused: It can't be done with this model.
        StepError, StorageError: A step failed.
    """
    from edgepack.heal.command import Options, healed_source
    from edgepack.prune.command import pruned_source

    check(wish)
    reference, source = original, original
    documents: list[Mapping[str, Any]] = []
    for request in _in_order(wish.prune):
        source, document = pruned_source(shop, source, request, calibration=calibration, evaluation=evaluation)
        documents.append(document)
        reference = source if request.vocabulary else reference
    if wish.heal is None:
        return Prepared(original, reference, source, tuple(documents))
    options = wish.options or Options()
    options = replace(options, data=options.data or calibration)
    healed, report = healed_source(shop, source, reference, wish.heal, evaluation=evaluation, options=options)
    return Prepared(original, reference, healed, tuple(documents), report)


def _in_order(request: Request | None) -> list[Request]:
    """A smaller vocabulary first and alone, then the rest."""
    if request is None:
        return []
    rest = replace(request, vocabulary=())
    if not request.vocabulary or rest.empty:
        return [request]
    from edgepack.prune.request import Request as Wanted

    return [Wanted(vocabulary=request.vocabulary), rest]
