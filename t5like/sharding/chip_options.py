"""XLA compiler options by chip, each with its reason. `xla_options` reads them.

benchmarks/RESULTS.md ("Effect of each change") has the measurements. libtpu 0.0.42, which jax 0.10.2 requires, and
0.0.52 accept those for TPUs; jaxlib 0.10.2 and 0.11.2 those for GPUs. docs/scaling.md says which options that guides
recommend for GPUs are left out, and why.
"""

from jaxlib.version import __version_info__ as jaxlib_version

Option = bool | int | str

# Gradients are reduced over fsdp in the backward pass of every layer, weights are gathered in both passes. With
# libtpu's defaults the reductions are exposed; on chips with sparse cores the gathers are exposed as well.
_SPARSE_CORES = {  # Sparse cores transfer the data while the matrix units compute.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
_PIPELINED: dict[str, Option] = (  # the reduction too that becomes a reduce-scatter; jaxlib 0.11.1 has new names
    {
        "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
        "xla_gpu_pipeline_all_reduce": "COLLECTIVE_PIPELINING_MODE_ON",
    }
    if jaxlib_version >= (0, 11, 1)
    else {"xla_gpu_enable_pipelined_all_gather": True, "xla_gpu_enable_pipelined_all_reduce": True}
)
OPTIONS: dict[str, dict[str, Option]] = {  # by JAX's name of the chip
    # By default operations are ordered so that several can run at a time, which needs a quarter to a third more memory.
    # Time of a step relative to that, of three shapes (benchmarks/RESULTS.md): 0.96, 1.07 and 1.00.
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "TPU v5 lite": {
        # An all-reduce runs inside the matmul after it, as all-gathers do by default. No other chip can do that.
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        # By default one all-reduce waits for the gradients of several matmuls, and then no work is left to hide it.
        # Gradients of norms are still combined: they are small, and each all-reduce has the latency of the network.
        "xla_jf_crs_combiner_threshold_in_bytes": 2**20,
    },
    "TPU v5": _SPARSE_CORES,  # v5p
    "TPU v6 lite": _SPARSE_CORES,
    "NVIDIA": {  # all of them
        # Each trip through a loop of layers gathers the weights of the next trip, and reduces the gradients of the last
        # one, behind its matmuls. Two trips are one body, which then swaps the buffers that it would copy.
        **_PIPELINED,
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
}
