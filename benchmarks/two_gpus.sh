#!/usr/bin/env bash
# Llama 1B on two GPUs, each way of splitting it, Meshloom beside torchtitan 0.2.2: the table "Two GPUs" of benchmarks/README.md.
# Run it from the root of the repository on a machine with two GPUs, with meshloom and torchtitan==0.2.2 installed.
set -u
ours() { torchrun --standalone --nproc-per-node 2 benchmarks/throughput.py model=1B steps=20 "$@" 2>/dev/null | grep '^{'; }
titan() {
    echo "torchtitan $*"
    torchrun --standalone --nproc-per-node 2 benchmarks/torchtitan_synthetic.py --training.steps 24 --metrics.log_freq 4 \
        --model.flavor 1B --training.seq_len 8192 --compile.enable --activation_checkpoint.mode none "$@" 2>&1 |
        grep -o 'memory:.*mfu\|OutOfMemoryError.*' | tail -2
}
ours batch=4 zero=3 label=fsdp2-zero3
ours batch=4 zero=2 label=fsdp2-zero2
titan --training.local_batch_size 4
ours batch=4 tp=2 label=tp2
titan --training.local_batch_size 4 --parallelism.tensor_parallel_degree 2
ours batch=8 micro=1 pp=2 zero=1 label=pp2-1f1b
titan --training.local_batch_size 8 --parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule 1F1B \
    --parallelism.pipeline_parallel_microbatch_size 1
ours batch=4 cp=2 label=cp2-ring
ours batch=4 cp=2 cp_kind=ulysses label=cp2-ulysses
titan --training.local_batch_size 4 --parallelism.context_parallel_degree 2
