#!/usr/bin/env bash
# Llama 1B on two GPUs, each way of splitting it, Meshloom beside torchtitan 0.2.2: the table "Two GPUs" of benchmarks/README.md.
# Run it from the root of the repository on a machine with two GPUs, with meshloom and torchtitan==0.2.2 installed.
#
# torchtitan mixes precisions where FSDP or context parallelism shards the weights, and nowhere else: under tensor or pipeline
# parallelism alone it computes in fp32, says so in its log, and runs out of memory with this work. It gets --training.dtype
# bfloat16 there: weights, gradients and Adam's moments in bf16 too, which is less to hold and to move than our fp32 masters.
set -u
ours() { torchrun --standalone --nproc-per-node 2 benchmarks/throughput.py model=1B warmup=3 steps=8 "$@" 2>/dev/null | grep '^{'; }
titan() {
    echo "torchtitan $*"
    torchrun --standalone --nproc-per-node 2 benchmarks/torchtitan_synthetic.py --training.steps 12 --metrics.log_freq 4 \
        --model.flavor 1B --training.seq_len 8192 --compile.enable --activation_checkpoint.mode none "$@" 2>&1 |
        grep -o 'memory:.*mfu\|OutOfMemoryError.*' | tail -2
}
PIPELINE="--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_microbatch_size 1"
ours batch=8 micro=1 pp=2 zero=1 label=pp2-1f1b
titan --training.local_batch_size 8 --training.dtype bfloat16 $PIPELINE --parallelism.pipeline_parallel_schedule 1F1B
ours batch=4 tp=2 label=tp2
titan --training.local_batch_size 4 --training.dtype bfloat16 --parallelism.tensor_parallel_degree 2
ours batch=4 zero=3 label=fsdp2-zero3
titan --training.local_batch_size 4
ours batch=4 cp=2 label=cp2-ring
ours batch=4 cp=2 cp_kind=ulysses label=cp2-ulysses
titan --training.local_batch_size 4 --parallelism.context_parallel_degree 2
ours batch=8 micro=1 pp=2 zero=1 schedule=zbv compile=0 label=pp2-zbv-eager
ours batch=8 micro=1 pp=2 zero=1 schedule=interleaved label=pp2-interleaved
