"""How the artifact of a package is run in the runtimes people have: commands with the real file names.

Ollama: a Modelfile with FROM, PARAMETER and LICENSE and no TEMPLATE, so that Ollama takes the chat template of the GGUF
(docs: ollama/docs/modelfile.mdx). LM Studio: `lms import` (lmstudio.ai/docs/cli). Commands start in the package folder.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

_SHARD = re.compile(r"(?:.*/)?(?P<stem>[^/]+)-00001-of-\d{5}\.gguf")
MAX_LICENCE_TEXT = 128 * 1024  # what a Modelfile carries; Ollama reads it whole


def sections(name: str, artifact: str, runtime: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, language of the code block, and code for every runtime.

    Args:
        name: What the model is called in Ollama and LM Studio.
        artifact: Path of the model file in the package.
        runtime: `runtime.json`.
    """
    options = llama_cpp_options(runtime)
    model = shlex.quote(artifact)
    short = _model_name(name)
    single = shlex.quote(_single_file(artifact))
    merge = "" if single == model else f"llama-gguf-split --merge {model} {single}  # it takes one file\n"
    if runtime.get("embedding"):
        llama_cpp = f'llama-embedding -m {model}{options} -p "a sentence"\nllama-server -m {model}{options} --embedding'
        ollama = f'ollama create {short} -f Modelfile\nollama run {short} "a sentence"'
    else:
        llama_cpp = f"llama-cli -m {model}{options}\nllama-server -m {model}{options} --port 8080  # API and chat page"
        ollama = f"ollama create {short} -f Modelfile\nollama run {short}"
    return [
        ("llama.cpp", "sh", llama_cpp),
        ("llama-cpp-python", "python", _python(artifact, runtime)),
        ("Ollama", "sh", merge + ollama),
        ("LM Studio", "sh", f"{merge}lms import {single} --user-repo edgepack/{short} --copy -y"),
    ]


def modelfile(artifact: str, runtime: Mapping[str, Any], licences: Mapping[str, bytes]) -> bytes:
    """The Modelfile: `ollama create NAME -f Modelfile` in the package folder.

    Args:
        artifact: Path of the model file in the package.
        runtime: `runtime.json`; its context becomes `num_ctx`, because Ollama's own default depends on the machine.
        licences: The files of LICENSES/.
    """
    file = _single_file(artifact)
    lines = [f"FROM {file}" if file.startswith("..") else f"FROM ./{file}"]
    if runtime.get("context"):
        lines.append(f"PARAMETER num_ctx {int(runtime['context'])}")
    for path in sorted(licences):
        text = licences[path].decode("utf-8", "replace")
        if '"""' not in text and len(text) <= MAX_LICENCE_TEXT:  # three quotes would end the text
            lines.append(f'LICENSE """{text.strip()}\n"""')
    return ("\n".join(lines) + "\n").encode()


def _single_file(artifact: str) -> str:
    """The model as one file: itself, or what the shards are merged to, beside the package, which stays as it is.

    Ollama imports no split GGUF (github.com/ollama/ollama/issues/5245); llama.cpp opens one by its first shard.
    """
    shard = _SHARD.fullmatch(artifact)
    return f"../{shard['stem']}.gguf" if shard else artifact


def llama_cpp_options(runtime: Mapping[str, Any]) -> str:
    """Context, threads and layers on the accelerator as llama.cpp's programs take them, each after a space.

    Args:
        runtime: `runtime.json`.
    """
    options = []
    if runtime.get("context"):
        options.append(f"-c {int(runtime['context'])}")
    if runtime.get("threads"):
        options.append(f"-t {int(runtime['threads'])}")
    layers = int(runtime.get("gpu_layers") or 0)
    if layers:
        options.append(f"-ngl {layers if layers > 0 else 999}")  # llama.cpp takes a number above the layer count as all
    return "".join(f" {option}" for option in options)


def _python(artifact: str, runtime: Mapping[str, Any]) -> str:
    arguments = [json.dumps(artifact, ensure_ascii=False)]
    if runtime.get("context"):
        arguments.append(f"n_ctx={int(runtime['context'])}")
    if runtime.get("threads"):
        arguments.append(f"n_threads={int(runtime['threads'])}")
    if runtime.get("gpu_layers"):
        arguments.append(f"n_gpu_layers={int(runtime['gpu_layers'])}")
    if runtime.get("embedding"):
        arguments.append("embedding=True")
        use = 'print(model.embed("a sentence"))'
    elif runtime.get("chat"):
        use = (
            'reply = model.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=64)\n'
            'print(reply["choices"][0]["message"]["content"])'
        )
    else:
        use = 'print(model("Once upon a time", max_tokens=64)["choices"][0]["text"])'
    return f"from llama_cpp import Llama\n\nmodel = Llama({', '.join(arguments)})\n{use}"


def _model_name(name: str) -> str:
    """A name that Ollama and LM Studio take: lower case letters, digits, `.`, `_`, `-`."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name.lower()).strip("-._")
    return kept or "model"
