"""The files beside a model's weights: which are copied, and which are not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.lab.data.samples import needs

pytestmark = needs("transformers")


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def copied(source: Path, out: Path, model: str = "") -> tuple[set[str], list[str]]:
    from einlinear_lab.pretrained.model_folder import copy_side_files

    out.mkdir()
    left = copy_side_files(source, out, model)
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names(out))
    return names(out), left


KEPT = (
    *("README.md", "LICENSE", ".gitattributes", "tokenizer.json", "vocab.txt", "chat_template.jinja"),
    *("preprocessor_config.json", "generation_config.json", "custom.py", "a b/ü.txt", "speech/model.safetensors"),
)
WEIGHTS = (
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("tf_model.h5", "flax_model.msgpack", "training_args.bin", "optimizer.pt", "consolidated.00.pth", "q4.gguf"),
)


def test_all_but_the_weights(tmp_path: Path) -> None:
    elsewhere = ("onnx/model.onnx", "openvino/openvino_model.xml", "checkpoint-500/optimizer.pt", ".git/config")
    source = write(tmp_path / "model", *KEPT, *WEIGHTS, *elsewhere)
    (source / "custom.py").chmod(0o755)
    found, left = copied(source, tmp_path / "out")
    assert found == {*KEPT}
    assert {*left} == {*WEIGHTS, "onnx/", "openvino/", "checkpoint-500/", ".git/"}
    assert not os.access(tmp_path / "out" / "custom.py", os.X_OK)


def test_the_weights_of_other_modules_are_kept(tmp_path: Path) -> None:
    from einlinear_lab.pretrained.model_folder import subfolder_of_model

    source = write(tmp_path / "st", "0_CLIP/model.safetensors", "2_Dense/pytorch_model.bin", "2_Dense/config.json")
    (source / "0_CLIP" / "config.json").write_text('{"model_type": "clip"}')
    (source / "modules.json").write_text(json.dumps([{"path": "2_Dense"}, {"path": "0_CLIP"}]))
    assert subfolder_of_model(source) == "0_CLIP"
    found, left = copied(source, tmp_path / "out", "0_CLIP")
    assert found == {"modules.json", "0_CLIP/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin"}
    assert left == ["0_CLIP/model.safetensors"]


def test_links(tmp_path: Path) -> None:
    secret = write(tmp_path / "outside", "secret")
    source = write(tmp_path / "model", "real.txt")
    (source / "alias.txt").symlink_to("real.txt")
    (source / "secret.txt").symlink_to(secret / "secret")
    (source / "gone.txt").symlink_to("nowhere")
    (source / "folder").symlink_to(secret)
    os.mkfifo(source / "pipe")
    found, left = copied(source, tmp_path / "out")
    assert found == {"real.txt", "alias.txt"}
    assert not (tmp_path / "out" / "alias.txt").is_symlink()
    assert left == [
        *("folder/ (a linked folder)", "gone.txt (not a regular file)", "pipe (not a regular file)"),
        "secret.txt (a link out of the folder)",
    ]


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    root = tmp_path / "models--someone--something"
    write(root, "blobs/123", "snapshots/abc/config.json")
    (root / "snapshots" / "abc" / "README.md").symlink_to("../../blobs/123")
    assert copied(root / "snapshots" / "abc", tmp_path / "out") == ({"config.json", "README.md"}, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        ("3", "is damaged"),
        ('[{"idx": 0}]', "is damaged"),
        ('[{"path": "../up"}]', "leads out of the folder"),
        ('[{"path": "/etc"}]', "leads out of the folder"),
    ],
)
def test_modules_that_are_damaged(content: str, message: str, tmp_path: Path) -> None:
    from einlinear_lab.pretrained.model_folder import subfolder_of_model

    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=rf"modules\.json .*{message}"):
        subfolder_of_model(tmp_path)
