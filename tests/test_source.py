"""What the user may call MODEL, what exactly it is, and under which licence."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pico
import pytest

from edgepack import licence
from edgepack.digest import digest, sha256_of
from edgepack.errors import InputRefused, UsageError
from edgepack.source import hash_source, resolve


def test_a_folder_is_its_files_and_nothing_that_lies_beside_them(tmp_path: Path) -> None:
    others = {"pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "run.py": b"x", "onnx/a.onnx": b"x"}
    folder = pico.write(tmp_path / "my model (v2)", pico.files() | others)
    source = hash_source(resolve(str(folder)))
    assert (source.kind, source.name, source.id, source.commit) == ("folder", "my-model-v2", None, None)
    assert source.licence == "Apache-2.0"
    assert source.files == {name: hashlib.sha256(data).hexdigest() for name, data in pico.files().items()}


def test_a_missing_shard_is_noticed_before_anything_is_hashed(tmp_path: Path) -> None:
    folder = pico.write(tmp_path, pico.sharded())
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputRefused, match=r"model-00001-of-00002\.safetensors is missing"):
        hash_source(resolve(str(folder)))


def test_a_gguf_is_one_file_or_all_its_shards(tmp_path: Path) -> None:
    (tmp_path / "pico-F16.gguf").write_bytes(b"GGUF1")
    source = hash_source(resolve(str(tmp_path / "pico-F16.gguf")))
    assert (source.kind, source.name) == ("gguf", "pico-F16")
    assert source.files == {"pico-F16.gguf": hashlib.sha256(b"GGUF1").hexdigest()}
    for number in (1, 2):
        (tmp_path / f"big-0000{number}-of-00002.gguf").write_bytes(b"GGUF%d" % number)
    split = resolve(str(tmp_path / "big-00001-of-00002.gguf"))
    assert split.name == "big"
    assert list(hash_source(split).files) == ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    with pytest.raises(InputRefused, match="one of 2 files of a split GGUF"):
        hash_source(split)


def test_a_snapshot_of_the_hugging_face_cache_knows_its_id_and_commit(tmp_path: Path) -> None:
    commit = "ab" * 20
    folder = pico.write(tmp_path / "models--acme--pico" / "snapshots" / commit)
    source = resolve(str(folder))
    assert (source.kind, source.name, source.id, source.commit) == ("folder", "pico", "acme/pico", commit)


def test_a_relative_path_is_named_after_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pico.write(tmp_path / "pico"))
    assert resolve(".").name == "pico"


def test_an_existing_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.write(tmp_path / "acme" / "pico")
    monkeypatch.chdir(tmp_path)
    assert resolve("acme/pico").kind == "folder"


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("pico", "Give a model folder"),
        ("no/such/folder", "There is no folder no/such either"),
        ("./acme/pico", "There is no folder"),
        ("/nonexistent/pico", "There is no folder /nonexistent either"),
        ("acme/pico.gguf", "There is no folder acme"),
        ("", "Give a model folder"),
        ("https://huggingface.co/acme/pico/tree/main", "Give acme/pico"),
        ("hf://acme/pico@main", "Give acme/pico"),
        ("my-modle", "Did you mean my-model?"),
        ("models/tiny-lama", "Did you mean models/tiny-llama? (For the model on the hub, give models/tiny-lama@main.)"),
        ("models/tiny-llama-f16.guf", "Did you mean models/tiny-llama-f16.gguf?"),
    ],
)
def test_what_is_neither_a_path_nor_an_id_gets_advice(
    model: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    (tmp_path / "models" / "tiny-llama-f16.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # a request would be another error
    with pytest.raises(UsageError) as caught:
        resolve(model)
    assert advice in str(caught.value.hint)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("model", ["a" * 300, "a\0b", "loop"])
def test_what_the_system_does_not_take_as_a_path_is_a_usage_error(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UsageError) as caught:
        resolve(model)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_given_as_the_model_is_refused_for_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(InputRefused, match="a pickle checkpoint, which can run code"):
        resolve(str(tmp_path / name))


def test_a_file_of_a_model_points_to_its_folder(tmp_path: Path) -> None:
    folder = pico.write(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve(str(folder / "model.safetensors"))
    assert str(folder) in str(caught.value.hint)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InputRefused, match="special file"):
        resolve(str(tmp_path / "pipe.gguf"))


def test_hashing_reports_every_byte_once_and_in_order(tmp_path: Path) -> None:
    contents = {f"{n}.bin": os.urandom((5 << 20) + n) for n in range(3)}
    files = {name: tmp_path / name for name in contents}
    for name, data in contents.items():
        files[name].write_bytes(data)
    seen: list[tuple[int, int]] = []
    found = sha256_of(files, lambda done, total: seen.append((done, total)))
    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    total = sum(map(len, contents.values()))
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_the_blob_id_is_gits(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")
    # printf 'hello\n' | git hash-object --stdin
    assert digest(tmp_path / "a", blob_id=True).blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_file_that_grows_while_it_is_hashed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(9 << 20))

    def grow(done: int, total: int) -> None:
        with path.open("ab") as file:
            file.write(b"x")

    with pytest.raises(InputRefused, match="changed while it was being read"):
        digest(path, progress=grow)


CARDS = [
    ("---\nlicense: apache-2.0\n---\n", "Apache-2.0"),
    ("---\r\nlanguage: en\r\nlicense: mit\r\n---\r\n", "MIT"),
    ('---\nlicense: "cc-by-nc-4.0" # see below\n---\n', "CC-BY-NC-4.0"),
    ("---\nlicense: llama3.1\n---\n", "llama3.1"),
    ("---\nlicense: other\nlicense_name: pico-research\nlicense_link: LICENSE\n---\n", "pico-research"),
    ("---\nlicense: other\n---\n", "other"),
    ("---\nlicense:\n- mit\n- apache-2.0\ntags: [x]\n---\n", "MIT AND Apache-2.0"),
    ("---\nlicense: [mit, apache-2.0]\n---\n", "MIT AND Apache-2.0"),
    ("---\nlicense: unknown\n---\n", None),
    ("---\nlicense:\n---\n", None),
    ("---\nbase:\n  license: mit\n---\n", None),
    ("---\nbase_model: x\n---\nlicense: mit\n", None),
    ("# no front matter\nlicense: mit\n", None),
    ("", None),
]


@pytest.mark.parametrize(("card", "expected"), CARDS)
def test_the_licence_of_a_card_is_its_front_matters(card: str, expected: str | None) -> None:
    assert licence.from_card(card) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "                                 Apache License\n                           Version 2.0, January 2004",
            "Apache-2.0",
        ),
        ("MIT License\n\nCopyright (c) 2026", "MIT"),
        ("Copyright 2026\n\nPermission is hereby granted, free of charge, to any person obtaining a copy", "MIT"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\n Version 3, 29 June 2007", "LGPL-3.0-only"),
        ("GNU GENERAL PUBLIC LICENSE\n Version 3, 29 June 2007", "GPL-3.0-only"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date", "llama3.2"),
        ("Redistribution and use in source and binary forms ... Neither the name of", "BSD-3-Clause"),
        ("Redistribution and use in source and binary forms, are permitted", "BSD-2-Clause"),
        ("Attribution-NonCommercial 4.0 International", "CC-BY-NC-4.0"),
        ("All rights reserved. You may not use this model, not even under the MIT licence.", None),
    ],
)
def test_a_licence_text_is_recognised_by_its_title(text: str, expected: str | None) -> None:
    assert licence.from_text(text) == expected


def test_the_repositorys_own_licence_is_recognised() -> None:
    assert licence.from_text((Path(__file__).parent.parent / "LICENSE").read_text()) == "Apache-2.0"


def test_a_licence_file_counts_when_the_card_is_silent(tmp_path: Path) -> None:
    contents = pico.files() | {"README.md": b"# pico\n", "LICENSE.txt": b"MIT License\n"}
    assert resolve(str(pico.write(tmp_path / "a", contents))).licence == "MIT"
    del contents["LICENSE.txt"]
    assert resolve(str(pico.write(tmp_path / "b", contents))).licence is None
