"""A mixture out of a dense model computes the same without noise, and its experts differ by noise of (seed, name) alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.checkpoint.convert.compose import Source, compose
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.launch.checkpoint import main
from meshloom.models.config import DecoderConfig, decoder_config
from meshloom.models.decoder import Decoder

SHAPE: dict[str, Any] = {"dim": 16, "layers": 3, "heads": 2, "kv_heads": 1, "ffn_dim": 12, "vocabulary": 29, "tied": True}


def save_dense(folder: Path, **keys: Any) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.of({**SHAPE, **keys})).double()
    sources = [
        Source(n, "weight", torch.float64, tuple(p.shape), p.data.normal_(0, 0.3).clone) for n, p in model.named_parameters()
    ]
    compose(folder, 0, sources, {"config": {"model": dataclasses.asdict(model.config)}, "imported_from": {"format": "test"}})
    return model


def upcycled(folder: Path) -> Decoder:
    files = open_files(folder / "step-00000000")
    manifest = load_manifest(files)
    model = Decoder(decoder_config(manifest.state["config"]["model"])).double()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.saved_buffers().items()):
            value.copy_(read_array(files, manifest, f"weight/{name}"))
    return model


def make(tmp_path: Path, output: str, *words: str) -> Decoder:
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / output), *words]) == 0
    return upcycled(tmp_path / output)


def test_copies_compute_what_the_dense_model_did(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    mixture = make(tmp_path, "mixture", "count=5", "top_k=2", "dense_layers=1", "capacity=1e2", "scores='softmax'")
    assert mixture.config.mixture_layers() == [1, 2] and mixture.config.experts.capacity == 100.0
    tokens = torch.randint(29, (2, 11))
    torch.testing.assert_close(mixture(tokens), dense(tokens), rtol=1e-12, atol=1e-12)


def test_noise_is_of_seed_and_name_and_as_large_as_asked_for(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", dim=64, ffn_dim=96)
    words = ["model.experts.count=4", "top_k=1", "--noise", "0.1", "--seed"]
    one, same, other = (make(tmp_path, name, *words, seed) for name, seed in (("a", "7"), ("b", "7"), ("c", "8")))
    for name, copied in one.named_parameters():
        assert torch.equal(copied, same.get_parameter(name))
        if ".experts." not in name:
            continue
        assert not torch.equal(copied, other.get_parameter(name))
        original = dense.get_parameter(name.replace("experts.", "") + ".weight")
        apart = (copied.unflatten(0, (4, -1)) - original).detach()
        assert float(apart.std() / original.detach().square().mean().sqrt()) == pytest.approx(0.1, rel=0.03)
        assert not torch.equal(apart[0], apart[1])
    assert not torch.equal(one.layers["0"].ffn.router.weight, one.layers["1"].ffn.router.weight)


def test_impossible_copies_are_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(tmp_path / "dense")
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "out"), "count=4", "top_k=9", "ffn_dim=5", "--noise", "-1"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "model.experts.top_k" in said and "as wide as the dense feed-forward, 12" in said and "noise=-1" in said
    assert main([*words[:3], "conut=4", "parts.product._target_=mine.Product"]) == 2
    assert "model.experts.conut: there is no such key; did you mean count?" in capsys.readouterr().err
    assert main([*words[:3], "count=[1", "top_k=1,2", "scale"]) == 2
    told = capsys.readouterr().err
    assert told.count("can't be read") == 2 and "model.experts.top_k=1,2: is not one value of a key" in told
    assert main([*words[:3], "count=many"]) == 2 and not (tmp_path / "out").exists()
    assert "model.experts.count: Value 'many'" in capsys.readouterr().err
    make(tmp_path, "mixture", "count=2", "top_k=1")
    assert main(["upcycle", str(tmp_path / "mixture"), str(tmp_path / "out"), "count=4"]) == 1
    assert "has experts already" in capsys.readouterr().err
