"""Families of Hugging Face: each is imported, computes and learns as `transformers` does, and goes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.kernels.documents import Documents
from meshloom.launch.checkpoint import main
from meshloom.models.config import decoder_config
from meshloom.models.decoder import Decoder
from meshloom.models.families import FAMILIES, StoredPart
from support.hf_families import CASES, SIZES, eager, make_model, make_model_with_pictures, save_tokenizer, stored_gradients

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")

LENGTHS = (9, 4, 11)
"""Of the documents that are packed into a row."""


def imported(step: Path) -> Decoder:
    """The decoder of an imported step, with its weights."""
    files = open_files(step)
    manifest = load_manifest(files)
    model = Decoder(decoder_config(manifest.state["config"]["model"]))
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.saved_buffers().items()):
            parameter.copy_(read_array(files, manifest, f"weight/{name}"))
    return model


def rows_of(tensor: torch.Tensor, part: StoredPart) -> torch.Tensor:
    """Return the rows of a part that are ours, one by one."""
    inner = tensor[part.index]
    rows = list(inner.T if part.transposed else inner)
    return torch.stack(rows if part.rows is None else rows[part.rows[0] : part.rows[1] : part.step])


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_and_learns_as_in_transformers(tmp_path: Path, name: str) -> None:
    theirs = make_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    ours = imported(tmp_path / "ours/step-00000000")

    documents = [torch.randint(3, SIZES["vocab_size"], (1, length)) for length in LENGTHS]
    packed = torch.cat(documents, dim=1)
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    expected = torch.cat([theirs(each).logits for each in documents], dim=1)
    torch.testing.assert_close(ours(packed, documents=Documents.of(ids)), expected, rtol=1e-5, atol=1e-5)
    whole = theirs(packed).logits
    torch.testing.assert_close(ours(packed), whole, rtol=1e-5, atol=1e-5)

    F.cross_entropy(whole[0, :-1], packed[0, 1:], reduction="sum").backward()
    targets = torch.cat([packed[:, 1:], torch.full((1, 1), -100)], dim=1)
    ours(packed, targets).backward()
    stored = FAMILIES[theirs.config.model_type].stored_weights(ours.config)
    gradients = stored_gradients(theirs)
    for key, parameter in ours.named_parameters():
        wanted = torch.cat([rows_of(gradients[part.name], part) for part in stored[key]])
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())), msg=key)


@pytest.mark.parametrize("name", CASES)
def test_a_family_goes_back_to_transformers_bit_for_bit(tmp_path: Path, name: str) -> None:
    theirs = make_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    save_tokenizer(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    words = ["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--tokenizer", str(tmp_path / "theirs")]
    assert main(words) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", **eager()).eval()
    assert type(back) is type(theirs) and back.dtype == torch.float32
    weights = theirs.state_dict()
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in back.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    tokens = torch.tensor([tokenizer("dab cabbage")["input_ids"]])
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(back.generate(tokens, **how), theirs.generate(tokens, **how))


def test_the_text_part_of_a_model_with_pictures_comes_in(tmp_path: Path) -> None:
    theirs = make_model_with_pictures()
    theirs.save_pretrained(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    left_out = load_manifest(open_files(tmp_path / "ours/step-00000000")).state["imported_from"]["left_out"]
    assert left_out and all("vision_tower" in name or "multi_modal_projector" in name for name in left_out)
    tokens = torch.randint(3, SIZES["vocab_size"], (1, 9))
    expected = theirs(input_ids=tokens, token_type_ids=torch.zeros_like(tokens)).logits
    torch.testing.assert_close(imported(tmp_path / "ours/step-00000000")(tokens), expected, rtol=1e-5, atol=1e-5)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert back.config.model_type == "gemma3_text"
    torch.testing.assert_close(back(tokens).logits, expected)
