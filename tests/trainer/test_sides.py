"""The side of each key: a table by judgement, in which a new key has to be entered."""

from __future__ import annotations

import pytest

from meshloom.config.keys import Side
from meshloom.trainer.schema import group_keys, groups
from meshloom.trainer.sides import key_sides
from support.configs import config_of

RECIPE, PLACEMENT, HABIT = Side.RECIPE, Side.PLACEMENT, Side.HABIT
IT_DEPENDS = "recipe where micro-batches change what is computed, else placement"

ALL_OF = {"model": RECIPE, "schedule": RECIPE, "balance": RECIPE, "parallel": PLACEMENT, "launch": PLACEMENT, "logging": HABIT}
"""Groups of which every key has one side: what is computed, where, and what is told of it."""

EACH = {
    "": {
        RECIPE: "recipe seed precision stages validation",
        PLACEMENT: "output_dir resume",
    },
    "data": {
        RECIPE: "_target_ _recursive_ name seq_len packing document_mask version tokenizer vocabulary tokenizer_sample"
        " end_of_document separator markup part field prompt messages chat_template fim_rate fim_spm_rate"
        " subset split revision sources weights block validation_samples",
        PLACEMENT: "input path cache_dir",
        HABIT: "verify",
    },
    "optim": {
        RECIPE: "_target_ name lr weight_decay lr_coupling betas eps interval begin anchor smoothing modules bias_correction"
        " norm_max momentum trust initial adamw_lr adamw_betas adamw_eps nesterov ns_steps scale beta2 shampoo_beta max_dim"
        " damping rank scaling growth seed decay_power clip block min_size"
        " per_head history fisher_damping period sign_scale beta3 alpha rise step_power"
        " local.islands local.quorum local.inner_steps local.lr local.momentum local.nesterov local.fragments local.delay"
        " local.mix local.clip local.aggregate local.dtype",
        PLACEMENT: "fused",
    },
    "batch": {
        RECIPE: "_target_ name samples stages max multiple over eta interval ema growth shrink unbiased literal nu tokens"
        " alpha",
        IT_DEPENDS: "micro micro_max",
    },
    "trainer": {
        RECIPE: "steps tokens max_grad_norm eval_every eval_samples float8 masters on_bad_step bad_step_limit spike_sigmas",
        PLACEMENT: "activation activation_budget compile",
        HABIT: "profile_step hooks sample_prompt sample_tokens compare_replicas_every",
    },
    "tasks": {PLACEMENT: "folder", HABIT: "names every few_shot limit"},
    "checkpoint": {
        PLACEMENT: "folder snapshot_folder strict lost_layers",
        HABIT: "every keep mode files memory_every memory_group host_memory_gib device_memory_gib failures timeout",
    },
}
"""Group → side → its keys. Where data lie is placement; what they are, and what is made of them, is recipe."""

SEVERAL = {"data.validation": {"recipe", "placement"}}
"""A share of documents, or for shards another folder."""


@pytest.mark.parametrize("group", groups())
def test_every_key_has_the_side_of_the_table(group: str) -> None:
    found: dict[str, set[str]] = {}
    for one in group_keys(group):
        side = IT_DEPENDS if str(one.key.side).startswith("placement; recipe under") else str(one.key.side)
        found.setdefault(one.key.name, set()).add(side)
    if group in ALL_OF:
        assert {name: {str(ALL_OF[group])} for name in found} == found
        return
    expected = {name: {str(side)} for side, names in EACH[group].items() for name in names.split()}
    expected |= {name.removeprefix(f"{group}."): sides for name, sides in SEVERAL.items() if name.startswith(f"{group}.")}
    assert found == expected


@pytest.mark.parametrize(
    "words",
    [
        ["batch=norm_test"],
        ["batch=augmented"],
        ["optim=agvm"],
        ["trainer.float8=tensorwise", "precision=bf16"],
        ["batch._target_=mine.Controller"],
        ["balance.micro_batch=0.01"],
        ["balance.counts=prefix"],
        ["model=moe_a1b", "model.experts.capacity=2"],
    ],
)
def test_the_micro_batch_is_recipe_where_it_changes_numbers(words: list[str]) -> None:
    assert key_sides(config_of("recipe=quickstart", *words))["batch.micro"] is RECIPE


@pytest.mark.parametrize("batch", ["fixed", "ramp", "critical_loss"])
def test_else_the_micro_batch_is_placement(batch: str) -> None:
    assert key_sides(config_of("recipe=quickstart", f"batch={batch}"))["batch.micro"] is PLACEMENT


def test_keys_of_a_users_class_are_recipe() -> None:
    sides = key_sides(config_of("recipe=quickstart", "optim._target_=mine.SGD", "++optim.nesterov=true"))
    assert sides["optim.nesterov"] is sides["optim.lr"] is RECIPE


def test_keys_of_a_mixtures_sources_have_their_options_sides() -> None:
    code = "++data.sources.code={_target_:meshloom.data.nodes.Jsonl,name:jsonl,input:x.jsonl,field:body}"
    sides = key_sides(config_of("recipe=quickstart", "data=mixture", code))
    assert (sides["data.sources.code.input"], sides["data.sources.code.field"]) == (PLACEMENT, RECIPE)
