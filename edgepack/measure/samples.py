"""Golden samples: fixed prompts and the tokens the artifact continues them with, greedily.

They travel in the package (`evidence/samples.jsonl`), so that whoever has the device can check in seconds that the
model there says what it said here. Loading the whole artifact and generating from it is also the plainest proof that
the runtime takes it.
"""

from __future__ import annotations

from typing import Any

from edgepack.worker import Progress, no_progress

# Plain prose, code, and numbers: three registers, short enough for every context length.
PROMPTS = ("The purpose of a test is", "def main(arguments):\n    ", "In 2024 there were 365 days and")
CONTINUATION = 24
CONTEXT = 256


def samples(
    *, artifact: str, embedding: bool, threads: int, gpu_layers: int = 0, progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """Load the artifact and run it on the fixed prompts.

    Args:
        artifact: GGUF file, or the first shard of a split one.
        embedding: True for an embedder: the sample is the first values of the vector, not a continuation.
        threads: Threads to compute on; greedy tokens may differ between machines, a sample says what they were here.
        gpu_layers: Layers on the accelerator; -1 moves all.
        progress: In prompts.

    Returns:
        One dictionary a prompt: `prompt`, `prompt_ids`, and `ids` with `text`, or `embedding` with `dimensions`.

    Raises:
        StepError: llama.cpp can't load the artifact, or it gives no finite output.
    """
    from edgepack.runtimes.llama_cpp import Model

    found = []
    with Model(artifact, context=CONTEXT, threads=threads, gpu_layers=gpu_layers, embeddings=embedding) as model:
        for done, prompt in enumerate(PROMPTS, 1):
            prompt_ids = model.tokenize(prompt, add_special=True, parse_special=False)
            output = _vector(model, prompt_ids) if embedding else _continuation(model, prompt_ids)
            found.append({"prompt": prompt, "prompt_ids": prompt_ids} | output)
            progress(done, len(PROMPTS))
    return found


def _continuation(model: Any, prompt_ids: list[int]) -> dict[str, Any]:
    model.clear()
    model.feed(prompt_ids, 0)
    ids: list[int] = []
    while len(ids) < CONTINUATION:
        ids.append(model.greedy())
        model.feed(ids[-1:], len(prompt_ids) + len(ids) - 1)
    return {"ids": ids, "text": model.detokenize(ids).decode("utf-8", "replace")}


def _vector(model: Any, prompt_ids: list[int]) -> dict[str, Any]:
    vector = model.embed([prompt_ids])[0]
    norm = float((vector**2).sum()) ** 0.5
    return {"dimensions": int(vector.size), "embedding": [round(float(x) / norm, 6) for x in vector[:16]]}
