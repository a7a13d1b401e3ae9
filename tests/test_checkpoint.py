"""Model folders: what is read is what the safetensors library reads, and what is unsafe or damaged is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hostile_safetensors as hostile
import numpy as np
import pico
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

from edgepack import model_folder
from edgepack.checkpoint import Checkpoint, open_checkpoint, read_float32, read_rows
from edgepack.errors import InputRefused, StorageError

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "tiny-llama-5m"


def _refusal(folder: Path, word: str) -> InputRefused:
    started = time.monotonic()
    with pytest.raises(InputRefused) as caught:
        open_checkpoint(folder)
    assert time.monotonic() - started < 2
    assert word in caught.value.message
    assert caught.value.message.isprintable()
    return caught.value


def _with(tmp_path: Path, **changes: bytes) -> Path:
    """The pico model with files replaced; `__` in a keyword stands for a dot."""
    return pico.write(tmp_path, pico.files() | {name.replace("__", "."): data for name, data in changes.items()})


def _measured(code: str, *arguments: Path) -> list[str]:
    """Lines that `code` prints in a fresh process, where `peak()` is the high-water mark of resident memory."""
    start = (
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from edgepack.checkpoint import *\n"
        "from edgepack.errors import InputRefused\n"
        "def peak():\n"
        "    if sys.platform == 'darwin': return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        # ru_maxrss starts at what the parent had; VmHWM does not
        "    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) << 10\n"
    )
    ran = subprocess.run([sys.executable, "-c", start + code, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\n")


# Reading


def test_the_example_model_reads_bit_for_bit_as_the_library_reads_it() -> None:
    checkpoint = open_checkpoint(EXAMPLE)
    assert checkpoint.model_type == "llama"
    assert checkpoint.parameters == 5_246_208
    with safe_open(EXAMPLE / "model.safetensors", "pt") as opened:
        assert set(checkpoint.tensors) == set(opened.keys())
        for name, info in checkpoint.tensors.items():
            expected = opened.get_tensor(name).float().numpy()
            rows = 1 if expected.ndim == 1 else expected.shape[0]
            assert np.array_equal(read_float32(info, 0, rows).reshape(expected.shape), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bool", "int64"])
def test_rows_come_in_the_files_own_dtype(dtype: str, tmp_path: Path) -> None:
    array = (np.random.default_rng(0).standard_normal((3, 4, 5)) * 4).astype(dtype)
    name = "attn.bias"  # a mask, the one kind of tensor that may hold integers
    folder = _with(tmp_path, model__safetensors=save({name: array}))
    info = open_checkpoint(folder).tensors[name]
    rows = read_rows(info, 2, 7)
    assert rows.shape == (5, 5)
    assert np.array_equal(rows, array.reshape(12, 5)[2:7])
    assert rows.tobytes() == array.reshape(12, 5)[2:7].tobytes()


def test_vectors_and_scalars_are_one_row(tmp_path: Path) -> None:
    tensors = {"vector": np.arange(6, dtype=np.float32), "scalar": np.array(1.5, np.float32)}
    checkpoint = open_checkpoint(_with(tmp_path, model__safetensors=save(tensors)))
    assert np.array_equal(read_rows(checkpoint.tensors["vector"], 0, 1), tensors["vector"][None])
    assert read_rows(checkpoint.tensors["scalar"], 0, 1).tolist() == [[1.5]]
    assert read_rows(checkpoint.tensors["vector"], 1, 1).shape == (0, 6)


def test_bfloat16_widens_exactly_over_all_65536_values(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save as save_torch

    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(256, 256)
    info = open_checkpoint(_with(tmp_path, model__safetensors=save_torch({"w": every}))).tensors["w"]
    assert np.array_equal(read_rows(info, 0, 256).reshape(-1), np.arange(65536, dtype=np.uint16))
    ours, theirs = read_float32(info, 0, 256), every.float().numpy()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_many_threads_read_one_tensor(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((400, 33), dtype=np.float32)
    info = open_checkpoint(_with(tmp_path, model__safetensors=save({"w": array}))).tensors["w"]
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda start: read_rows(info, start, start + 4), range(0, 400, 4)))
    assert np.array_equal(np.concatenate(pieces), array)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 33), (2, 1)])
def test_rows_outside_the_tensor_are_the_callers_mistake(start: int, stop: int, tmp_path: Path) -> None:
    info = open_checkpoint(pico.write(tmp_path)).tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        read_rows(info, start, stop)


def test_reading_does_not_map_the_file(tmp_path: Path) -> None:
    array = np.zeros((64 << 10, 256), np.float32)  # 64 MiB
    info = open_checkpoint(_with(tmp_path, model__safetensors=save({"w": array}))).tensors["w"]
    grown, _ = _measured(
        "info = open_checkpoint(Path(sys.argv[1])).tensors['w']\n"
        "before = peak()\n"
        "for row in range(0, 65536, 1024): read_rows(info, row, row + 1024)\n"
        "print(peak() - before)",
        tmp_path,
    )
    assert int(grown) < 8 << 20  # a mapping would add 64 MiB
    assert info.nbytes == array.nbytes


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    folder = pico.write(tmp_path, pico.sharded())
    checkpoint = open_checkpoint(folder)
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    for info in checkpoint.tensors.values():
        assert np.array_equal(read_rows(info, 0, 32), load(info.file.read_bytes())[info.name])


def test_a_real_repository_has_much_beside_the_model_and_none_of_it_is_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {canary}",)

    bomb = pickle.dumps(Bomb())
    folder = pico.write(
        tmp_path / "model",
        pico.files()
        | {
            "pytorch_model.bin": bomb,
            "original/consolidated.00.pth": bomb,
            "consolidated.safetensors": b"another format of the same model",
            "onnx/model.onnx": b"onnx",
            "modeling_pico.py": f"open({str(canary)!r}, 'w')".encode(),
            ".gitattributes": b"*.bin filter=lfs",
            "tokenizer.model": b"\n\x07sentencepiece",
            "odd\u202ename.txt": b"",
            "CON": b"",
        },
    )
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert checkpoint.data("tokenizer.model") == b"\n\x07sentencepiece"
    assert not canary.exists()


def test_masks_and_position_ids_of_old_checkpoints_are_normal_and_no_parameters(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
        "embeddings.position_ids": np.arange(8, dtype=np.int64)[None],
        "wte.weight": np.ones((4, 8), np.float32),
    }
    assert open_checkpoint(_with(tmp_path, model__safetensors=save(tensors))).parameters == 32


def test_files_of_the_folder_are_read_by_name(tmp_path: Path) -> None:
    folder = pico.write(
        tmp_path,
        pico.files()
        | {
            "tokenizer.json": b'{"model": {}}',
            "chat_template.jinja": "{{ 'ä' }}".encode(),
            "modules.json": b'[{"idx": 0}]',
            "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
        },
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.json("tokenizer.json") == {"model": {}}
    assert checkpoint.json("1_Pooling/config.json") == {"pooling_mode_mean_tokens": True}
    assert checkpoint.json_array("modules.json") == [{"idx": 0}]
    assert checkpoint.text("chat_template.jinja") == "{{ 'ä' }}"
    assert checkpoint.json("vocab.json") is None
    assert checkpoint.json_array("2_Dense/config.json") is None
    assert checkpoint.text("LICENSE") is None


@pytest.mark.parametrize(
    ("name", "data", "read", "word"),
    [
        ("tokenizer.json", b'{"a": 1, "a": 2}', Checkpoint.json, "duplicate key 'a'"),
        ("tokenizer.json", b"[]", Checkpoint.json, "expected a JSON object, found array"),
        ("modules.json", b"{}", Checkpoint.json_array, "expected a JSON array, found object"),
        ("chat_template.jinja", b"x" * (64 * 1024 + 1), Checkpoint.text, "65,537 bytes, and at most 65,536"),
        ("chat_template.jinja", b"\xff", Checkpoint.text, "not UTF-8 at byte 0"),
        ("sentence_bert_config.json", b'{"auto_map": {"x": "y.Z"}}', Checkpoint.json, "auto_map"),
    ],
)
def test_a_file_that_is_wrong_is_refused_when_it_is_read(
    name: str, data: bytes, read: Callable[[Checkpoint, str], Any], word: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(pico.write(tmp_path, pico.files() | {name: data}))
    with pytest.raises(InputRefused) as caught:
        read(checkpoint, name)
    assert word in caught.value.message
    assert name in caught.value.message


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "pytorch_model.bin", "a/../config.json", "x.py", ""])
def test_a_name_off_the_allow_list_is_never_read(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pico.write(tmp_path))
    with pytest.raises(InputRefused):
        checkpoint.json(name)


# Weight files


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = pico.write(tmp_path, pico.sharded())
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "fetch" in str(_refusal(folder, "model-00002-of-00002.safetensors is missing").hint)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = pico.write(tmp_path, pico.sharded())
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert str(shard) in _refusal(folder, "truncated").message


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    contents = pico.sharded()
    index = json.loads(contents["model.safetensors.index.json"])
    first, _ = sorted(set(index["weight_map"].values()))

    def refused(name: str, weight_map: dict[str, Any], word: str) -> None:
        changed = json.dumps(index | {"weight_map": weight_map}).encode()
        _refusal(pico.write(tmp_path / name, contents | {"model.safetensors.index.json": changed}), word)

    good = index["weight_map"]
    refused(
        "ghost", good | {"ghost.weight": first}, "ghost.weight should be in model-00001-of-00002.safetensors, but no"
    )
    refused("outside", good | {"x": "../model.safetensors"}, "is no safetensors file of this folder")
    refused("pickle", good | {"x": "pytorch_model.bin"}, "is no safetensors file of this folder")
    refused("number", good | {"x": 5}, "is no safetensors file of this folder")
    refused("name", good | {"../x": first}, "tensor name '../x' is not allowed")
    refused("none", {}, "weight_map must be a non-empty object")


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path) -> None:
    contents = pico.sharded()
    text = contents["model.safetensors.index.json"].decode()
    swapped = text.replace("-00001-", "-X-").replace("-00002-", "-00001-").replace("-X-", "-00002-")
    # "-of-00002" stands after the shard number and is not touched: only the numbers change places
    swapped = swapped.replace("of-00001", "of-00002")
    folder = pico.write(tmp_path, contents | {"model.safetensors.index.json": swapped.encode()})
    _refusal(folder, "but it is in")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    contents = pico.sharded()
    contents["model-00001-of-00002.safetensors"] = pico.weights()
    _refusal(pico.write(tmp_path, contents), "model.norm.weight is both in")


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pico.write(tmp_path, pico.sharded() | {"model.safetensors": pico.weights()}))
    assert {info.file.name for info in checkpoint.tensors.values()} == {"model.safetensors"}


def test_a_lone_file_of_another_name_is_taken_and_two_need_an_index(tmp_path: Path) -> None:
    contents = pico.files()
    contents["pico-f16.safetensors"] = contents.pop("model.safetensors")
    assert open_checkpoint(pico.write(tmp_path / "one", contents)).tensors
    contents["other.safetensors"] = pico.weights()
    error = _refusal(
        pico.write(tmp_path / "two", contents), "2 safetensors files (other.safetensors, pico-f16.safetensors)"
    )
    assert "model.safetensors.index.json" in str(error.hint)


@pytest.mark.parametrize(
    ("files", "word", "advice"),
    [
        (("pytorch_model.bin",), "only pickle weights (pytorch_model.bin)", "save_pretrained"),
        (("pytorch_model-00001-of-00002.bin",), "only pickle weights", "save_pretrained"),
        (("model.pt",), "only pickle weights (model.pt)", "save_pretrained"),
        (("consolidated.00.pth", "params.json"), "only pickle weights", "save_pretrained"),
        (("model.PKL",), "only pickle weights", "save_pretrained"),
        (("adapter_config.json", "adapter_model.safetensors"), "a LoRA adapter", "merge_and_unload"),
        (("pico-f16.gguf",), "no safetensors, but pico-f16.gguf", ".gguf"),
        ((), "no *.safetensors files", "Hugging Face layout"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_has_and_what_to_do(
    files: tuple[str, ...], word: str, advice: str, tmp_path: Path
) -> None:
    contents = pico.files() | dict.fromkeys(files, b"\x80\x04.")
    del contents["model.safetensors"]
    assert advice in str(_refusal(pico.write(tmp_path, contents), word).hint)


@pytest.mark.parametrize("name", hostile.CASES)
def test_every_malformed_safetensors_file_refuses_the_folder(name: str, tmp_path: Path) -> None:
    data, word, _ = hostile.CASES[name]
    _refusal(_with(tmp_path, model__safetensors=data), word)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [("F8_E4M3", "FP8"), ("F8_E5M2", "FP8"), ("F4", "FP4"), ("I8", "INT8"), ("U8", "packed"), ("I32", "I32")],
)
def test_a_dtype_ggml_does_not_take_is_named_with_its_tensor(dtype: str, word: str, tmp_path: Path) -> None:
    entry = hostile.tensor(0, 8 if dtype != "I32" else 32, dtype=dtype, shape=[16 if dtype == "F4" else 8])
    data = hostile.file({"layers.0.weight": entry}, bytes(entry["data_offsets"][1]))
    error = _refusal(_with(tmp_path, model__safetensors=data), f"layers.0.weight is {dtype}: {word}")
    assert "unquantized" in str(error.hint)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    info = open_checkpoint(pico.write(tmp_path)).tensors["model.norm.weight"]
    os.truncate(info.file, info.offset + 8)
    with pytest.raises(InputRefused, match=r"ends inside tensor model\.norm\.weight"):
        read_rows(info, 0, 32)
    info.file.unlink()
    with pytest.raises(InputRefused, match="changed while"):
        read_rows(info, 0, 32)


def test_an_input_output_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = open_checkpoint(pico.write(tmp_path)).tensors["model.norm.weight"]

    class Broken:
        def readinto(self, view: memoryview) -> int:
            raise OSError(5, "Input/output error")

        def tell(self) -> int:
            return 7

    with pytest.raises(StorageError, match=r"model\.safetensors: can't be read at byte 7: Input/output error"):
        model_folder.read_into(Broken(), memoryview(bytearray(4)), info.file)  # type: ignore[arg-type]


# Links and special files


def test_a_snapshot_of_the_hugging_face_cache_is_made_of_links_and_reads(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--acme--pico"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, (name, data) in enumerate(pico.files().items()):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    assert open_checkpoint(snapshot).parameters == 512
    # In huggingface_hub 2 a blob may in turn be a link into a store that all repositories share.
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" + "0" * 62)
    shared.parent.mkdir(parents=True)
    blob = (snapshot / "model.safetensors").resolve()
    shutil.move(blob, shared)
    blob.symlink_to(Path("../../blobs/ab") / shared.name)
    assert open_checkpoint(snapshot).parameters == 512
    # Anything else outside is not part of the cache.
    (tmp_path / "hub" / "blobs" / "x").write_bytes(pico.weights())
    blob.unlink()
    blob.symlink_to(tmp_path / "hub" / "blobs" / "x")
    _refusal(snapshot, "a link that leaves the model folder")


def test_a_folder_reached_through_a_link_and_a_link_inside_it_are_fine(tmp_path: Path) -> None:
    folder = pico.write(tmp_path / "real")
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "link").symlink_to("real")
    assert open_checkpoint(tmp_path / "link").parameters == 512


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "LICENSE", "README.md"])
@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "nowhere", "loop"])
def test_a_link_out_of_the_folder_or_to_nothing_is_refused(name: str, target: str, tmp_path: Path) -> None:
    folder = pico.write(tmp_path / "model")
    (tmp_path / "secret").write_bytes(b"{}")
    (folder / "loop").symlink_to("loop")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    assert str(folder / name) in _refusal(folder, "").message


def test_a_linked_subfolder_is_no_way_out(tmp_path: Path) -> None:
    folder = pico.write(tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_bytes(b"{}")
    (folder / "1_Pooling").symlink_to(tmp_path / "outside")
    _refusal(folder, "a link that leaves the model folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_special_files_are_refused_without_waiting_for_them(name: str, tmp_path: Path) -> None:
    for kind in ("pipe", "socket", "folder"):
        folder = pico.write(tmp_path / kind)
        (folder / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(folder / name)
            _refusal(folder, "found a named pipe")
        elif kind == "folder":
            (folder / name).mkdir()
            _refusal(folder, "found a folder")
        else:
            with socket.socket(socket.AF_UNIX) as end:
                before = Path.cwd()
                os.chdir(folder)  # the path of a socket may have 107 characters
                try:
                    end.bind(name)
                finally:
                    os.chdir(before)
                _refusal(folder, "found a socket")


@pytest.mark.parametrize(
    "name", ["a\nb.safetensors", "x\u202e.safetensors", "..safetensors", "-rf.safetensors", "a" * 230 + ".safetensors"]
)
def test_a_weight_file_with_an_odd_name_is_not_taken(name: str, tmp_path: Path) -> None:
    contents = pico.files()
    contents[name] = contents.pop("model.safetensors")
    _refusal(pico.write(tmp_path, contents), "no *.safetensors files")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    _refusal(tmp_path / "nothing", "expected a model folder")
    (tmp_path / "file").write_bytes(b"")
    _refusal(tmp_path / "file", "expected a model folder")


def test_a_folder_with_too_many_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "MAX_ENTRIES", 4)
    _refusal(pico.write(tmp_path), "more than 4 entries")


def test_huge_files_are_refused_in_little_memory(tmp_path: Path) -> None:
    """200 MB of config.json, a 120 MB header, a header length of 2^63: sparse, so that they cost no disk."""
    for name, file in (
        ("config", "config.json"),
        ("index", "model.safetensors.index.json"),
        ("header", "model.safetensors"),
    ):
        folder = pico.write(tmp_path / name, pico.sharded() if name == "index" else pico.files())
        with (folder / file).open("r+b") as opened:
            if name == "header":
                opened.write((120_000_000).to_bytes(8, "little"))
            opened.truncate(200_000_000)
    *refused, peak = _measured(
        "for path in sys.argv[1:]:\n"
        "    try: open_checkpoint(Path(path))\n"
        "    except InputRefused as error: print('refused', error.message.count('at most'))\n"
        "print(peak())",
        *(tmp_path / name for name in ("config", "index", "header")),
    )[:-1]
    assert refused == ["refused 1"] * 3
    assert int(peak) < 300_000_000
