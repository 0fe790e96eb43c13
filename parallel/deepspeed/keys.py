"""The keys of DeepSpeed 0.19.8's own configuration: which the recipe decides, which are refused and why, which are open.

DeepSpeed ignores unknown top-level keys, and reports others only when it starts. These tables find both before that.
A test compares these tables with DeepSpeed's own code.
"""

from __future__ import annotations

# Keys of DeepSpeed's configuration that the recipe decides, and the recipe's key.
DECIDED = {
    "train_batch_size": "batch.samples",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.samples and batch.micro",
    "managed_gradient_accumulation": "batch.samples and batch.micro",
    "gradient_clipping": "trainer.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "data_types": "precision",
    "torch_autocast": "precision",
    "communication_data_type": "precision",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "parallel.deepspeed.cpu_adam",
    "activation_checkpointing": "trainer.activation",
    "compile": "trainer.compile",
    "tensor_parallel": "parallel.tp",
    "pipeline": "parallel.pp",
    "seq_parallel_communication_data_type": "precision",
    "vocabulary_size": "model.vocabulary",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
    "seed": "seed",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.offload_path",
    "zero_optimization.offload_param.device": "parallel.offload_weights",
    "zero_optimization.offload_param.nvme_path": "parallel.offload_path",
    "zero_optimization.cpu_offload": "parallel.offload",
    "zero_optimization.cpu_offload_param": "parallel.offload_weights",
    "zero_optimization.compute_grad_norm": "trainer.max_grad_norm",
}

# Keys that would break a rule of this framework, or that DeepSpeed 0.19.8 refuses or gets wrong.
REFUSED = {
    "prescale_gradients": "it moves the division by the number of ranks, on which the token-weighted loss (R2) relies",
    "gradient_predivide_factor": "it moves the division by the number of ranks, on which the token-weighted loss (R2) relies",
    "gradient_allreduce_op": "the token-weighted loss (R2) relies on the mean over ranks",
    "data_efficiency": "the recipe's data order is the only one (R1)",
    "dataloader_drop_last": "the recipe's data order is the only one (R1)",
    "expert_parallel": "DeepSpeed names experts by rank, so a checkpoint could not tell them apart (R6)",
    "use_data_before_expert_parallelism": "DeepSpeed names experts by rank, so a checkpoint could not tell them apart (R6)",
    "sequence_parallel_size": "ZeRO-1 and 2 would sum gradients over the sequence's ranks where ZeRO-3 averages them, without "
    "a word; parallel.engine=torch has Ulysses with parallel.cp and parallel.cp_kind=ulysses",
    "disable_allgather": "DeepSpeed 0.19.8 reads it and then does nothing with it",
    "autotuning": "DeepSpeed's own launcher runs it; `meshloom tune` compares layouts",
    "comet": "metrics go where the recipe says (logging), or a hook of your own",
    "hybrid_engine": "it is for generating text between updates, as reinforcement learning does",
    "weight_quantization": "it changes the model that the recipe names",
    "zero_optimization.round_robin_gradients": "in DeepSpeed 0.19.8 it corrupts resharded state silently",
    "zero_optimization.zenflow": "it updates some weights a step late, so the losses would not be the recipe's",
    "zero_optimization.memory_efficient_linear": "it replaces torch.nn.functional.linear in the whole process",
    "zero_optimization.offload_optimizer.ratio": "it splits the update over two optimizers of different arithmetic",
    "zero_optimization.offload_optimizer.super_offload": "it is an optimizer of its own that can't be read by name",
    "zero_optimization.zero_quantized_gradients": "DeepSpeed's int4 kernel (ZeRO++ qgZ) takes what it is given for fp16, and "
    "gradients are reduced in fp32 here, so it would compute others without a word",
    "zero_optimization.zero_quantized_nontrainable_weights": "no parameter is frozen here",
    "zero_optimization.elastic_checkpoint": "checkpoints are this framework's own",
    "zero_optimization.pipeline_loading_checkpoint": "checkpoints are this framework's own",
    "zero_optimization.legacy_stage1": "it is DeepSpeed 0.3's ZeRO-1",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "it is for Muon, which needs whole matrices",
    "zero_optimization.parameter_alignment": "it pads parameters inside the flat groups, which are read by name here (R6)",
    "zero_optimization.leaf_module": "blocks are the leaves here: their weights are gathered together",
    "zero_optimization.stage3_module_granularity_threshold": "blocks are the leaves here: their weights are gathered together",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to SuperOffload",
    "aio.use_gds": "nobody has read a checkpoint out of state that goes from the disk to the GPU past the host",
}

# Keys that make DeepSpeed 0.19.8 stop, whatever their value, and what there is instead.
REMOVED = {
    "amp": "precision=bf16",
    "compression_training": None,
    "curriculum_learning": None,
    "eigenvalue": None,
    "elasticity": "a run changes its number of processes by resuming",
    "graph_harvesting": None,
    "nebula": "checkpoints are this framework's own",
    "progressive_layer_drop": None,
    "quantize_training": None,
    "sparse_attention": None,
    "sparse_gradients": None,
    "zero_optimization.mics_shard_size": "zero_hpz_partition_size keeps the weights' second copy near, and "
    "parallel.engine=torch shards within groups with parallel.replicate",
    "zero_optimization.mics_hierarchical_params_gather": "zero_hpz_partition_size keeps the weights' second copy near",
    "zero_optimization.zeropp_loco_param": None,
}

# Keys that break a rule but are allowed on request. Start-up warns of them.
LOSSY = {
    "zero_optimization.zero_quantized_weights": "weights are quantised to int8 on the wire (ZeRO++ qwZ)",
}

# Other names of keys, which DeepSpeed reads too: one name is enough.
ALIASES = {
    "zero_optimization.prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "stage3_param_persistence_threshold",
    "zero_optimization.model_persistence_threshold": "stage3_model_persistence_threshold",
    "zero_optimization.max_live_parameters": "stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "stage3_max_reuse_distance",
    "zero_optimization.gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.module_granularity_threshold": "stage3_module_granularity_threshold",
    "zero_optimization.use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.allgather_sequential": "stage3_allgather_sequential",
    "zero_optimization.cpu_offload_use_pin_memory": "offload_optimizer.pin_memory and offload_param.pin_memory",
}

# What DeepSpeed 0.19.8 reads and this engine leaves to the user. Whole numbers, and the least that works:
COUNTS = {
    "steps_per_print": 1,
    "aio.block_size": 1,
    "aio.intra_op_parallelism": 1,
    "aio.queue_depth": 1,
    "flops_profiler.module_depth": -1,
    "flops_profiler.profile_step": 1,
    "flops_profiler.top_modules": 1,
    "zero_optimization.allgather_bucket_size": 1,
    "zero_optimization.reduce_bucket_size": 1,
    "zero_optimization.stage3_max_live_parameters": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "zero_optimization.stage3_model_persistence_threshold": 0,
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_prefetch_bucket_size": 0,
    "zero_optimization.sub_group_size": 1,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.offload_optimizer.buffer_count": 4,  # Adam's master, gradient and two moments
    "zero_optimization.offload_param.buffer_count": 1,
    "zero_optimization.offload_param.buffer_size": 1,
    "zero_optimization.offload_param.max_in_cpu": 0,
}
SWITCHES = (
    "aio.overlap_events",
    "aio.single_submit",
    "comms_logger.debug",
    "comms_logger.enabled",
    "comms_logger.prof_all",
    "comms_logger.verbose",
    "csv_monitor.enabled",
    "disable_python_gc",
    "dump_state",
    "flops_profiler.detailed",
    "flops_profiler.enabled",
    "memory_breakdown",
    "timers.throughput.enabled",
    "timers.throughput.synchronized",
    "wall_clock_breakdown",
    "zero_optimization.allgather_partitions",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.enable_sanity_checks",
    "zero_optimization.ignore_unused_parameters",
    "zero_optimization.load_from_fp32_weights",
    "zero_optimization.log_trace_cache_warnings",
    "zero_optimization.overlap_comm",
    "zero_optimization.override_module_apply",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_allgather_sequential",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.offload_optimizer.fast_init",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_optimizer.pipeline_read",
    "zero_optimization.offload_optimizer.pipeline_write",
    "zero_optimization.offload_param.pin_memory",
)
NULLABLE = ("steps_per_print", "aio", "zero_optimization.overlap_comm", "flops_profiler.output_file")
"""Keys and groups whose null is DeepSpeed's own default."""

WORDS = {"log_level": ("debug", "info", "warning", "error", "critical")}
FREE = (
    "comms_logger.prof_ops",
    "csv_monitor.job_name",
    "csv_monitor.output_path",
    "flops_profiler.output_file",
    "flops_profiler.recompute_fwd_factor",
)
OPEN = (*COUNTS, *SWITCHES, *WORDS, *FREE)

# Those that are read only where something is offloaded, or is offloaded to NVMe: the recipe's key, and the places.
_OPTIMIZER, _WEIGHTS = "zero_optimization.offload_optimizer", "zero_optimization.offload_param"
NEEDED = {
    "aio": (("offload", "offload_weights"), ("nvme",)),
    **{
        f"{_OPTIMIZER}.{key}": (("offload",), ("nvme",))
        for key in ("buffer_count", "fast_init", "pipeline_read", "pipeline_write")
    },
    **{f"{_WEIGHTS}.{key}": (("offload_weights",), ("nvme",)) for key in ("buffer_count", "buffer_size", "max_in_cpu")},
    _OPTIMIZER: (("offload",), ("cpu", "nvme")),
    _WEIGHTS: (("offload_weights",), ("cpu", "nvme")),
}
