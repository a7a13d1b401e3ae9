"""Chats through transformers and through the GGUF's own template and vocabulary."""

from __future__ import annotations

import time
from pathlib import Path

import families
import pytest

from edgepack.conform.chat import CHATS, chat
from edgepack.errors import ConformanceError, InputRefused
from edgepack.gguf.file import boolean, encode_header, read_gguf, string
from edgepack.worker import no_progress

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Mistral: no system role; tools as JSON before the last question
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% elif message['role'] == 'user' %}"
    "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('System role"
    " not supported') }}{% endif %}{{ '<start_of_turn>' + (message['role'] if message['role'] == 'user' else 'model')"
    " + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def check(artifact: Path, source: Path, **options: float) -> dict:
    return chat(artifact=str(artifact), source=str(source), progress=no_progress, **options)


@pytest.mark.parametrize(
    ("family", "template", "chats", "skipped"),
    [
        ("qwen2", families.CHATML, 2, {"tools"}),
        ("smollm", families.CHATML, 2, {"tools"}),
        ("llama3", LLAMA3, 2, {"tools"}),
        ("tekken", MISTRAL, 2, {"system"}),
        ("mistral", MISTRAL, 2, {"system"}),
        ("gemma", GEMMA, 1, {"system", "tools"}),
        ("phi-3", PHI3, 2, {"tools"}),
    ],
)
def test_chats_give_the_ids_that_transformers_gives(
    family: str, template: str, chats: int, skipped: set, tmp_path: Path
) -> None:
    folder, artifact = families.build(tmp_path / family, family, chat_template=template)
    result = check(artifact, folder)
    assert result["chats"] == chats
    assert set(result["skipped"]) == skipped
    assert result["tokens"] > 40 * chats


def test_a_template_that_knows_tools_gets_them(tmp_path: Path) -> None:
    template = families.CHATML + "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    folder, artifact = families.build(tmp_path / "m", "qwen2", chat_template=template)
    assert check(artifact, folder)["chats"] == len(CHATS)


def test_named_templates_are_carried_and_the_one_for_tools_is_used(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": families.CHATML},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + families.CHATML},
    ]
    folder, artifact = families.build(tmp_path / "m", "qwen2", chat_template=templates)
    header = read_gguf(artifact)
    assert header.get("tokenizer.chat_template") == families.CHATML
    assert list(header.get("tokenizer.chat_templates")) == ["tool_use"]
    assert check(artifact, folder)["chats"] == len(CHATS)


def test_a_model_without_template_has_nothing_to_compare(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "gpt2")
    assert check(artifact, folder) == {
        "chats": 0,
        "tokens": 0,
        "skipped": {},
        "note": "the model has no chat template",
    }


def with_template(artifact: Path, template: str | None) -> Path:
    metadata = dict(read_gguf(artifact).metadata)
    metadata.pop("tokenizer.chat_template", None)
    if template is not None:
        metadata["tokenizer.chat_template"] = string(template)
    artifact.write_bytes(encode_header(metadata, [])[0])
    return artifact


def test_a_template_on_one_side_only_stops_the_build(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "qwen2", chat_template=families.CHATML)
    with pytest.raises(ConformanceError, match="only the source has one"):
        check(with_template(artifact, None), folder)
    folder, artifact = families.build(tmp_path / "n", "gpt2")
    with pytest.raises(ConformanceError, match="only the artifact has one"):
        check(with_template(artifact, families.CHATML), folder)


def test_another_template_is_shown_where_it_differs(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "qwen2", chat_template=families.CHATML)
    other = families.CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>model\n'")
    with pytest.raises(ConformanceError, match=r"chat 'turns' renders differently at character \d+: .*'model"):
        check(with_template(artifact, other), folder)


def test_chats_that_llama_cpp_reads_otherwise_stop_the_build(tmp_path: Path) -> None:
    # Phi-3's special tokens take the line break after them; llama.cpp does that only when the model's name says Phi-3.
    folder, artifact = families.build(tmp_path / "another-name", "phi-3", chat_template=PHI3)
    with pytest.raises(ConformanceError, match="chat 'turns': ids differ"):
        check(artifact, folder)


def test_bos_that_only_transformers_adds_stops_the_build(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "llama3", chat_template=LLAMA3)
    metadata = read_gguf(artifact).metadata | {"tokenizer.ggml.add_bos_token": boolean(False)}
    artifact.write_bytes(encode_header(metadata, [])[0])
    with pytest.raises(ConformanceError, match="special tokens around a text: transformers adds"):
        check(artifact, folder)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not finish within 1 s"),
        ("{{ 9**99999999 }}", "did not finish within 1 s"),
        ("{{ 'a' * 9000000000 }}", "did not finish within 1024 MiB of memory"),
        (
            "{% set n = namespace(x='aaaaaaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "did not finish",
        ),
        ("{{ 'a' * 5000000 }}", "it renders to 5000000 characters"),
        ("{% for %}", "can't render a plain chat: TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "can't render a plain chat"),
        ("{% include '/etc/passwd' %}", "can't render a plain chat"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('no chats here') }}", "no chats here"),
    ],
)
def test_a_hostile_template_is_refused_in_one_line(template: str, words: str, tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "smollm", chat_template=template)
    start = time.monotonic()
    with pytest.raises(InputRefused) as caught:
        check(artifact, folder, seconds=1)
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 5
    assert time.monotonic() - start < 8
