"""Makes the scheduled programs that tests/plan/test_plan.py reads: probes of known size.

They are compiled for a TPU without one.

    python tests/golden/make_hlo.py      # needs libtpu (pip install 't5like[tpu]'), no TPU; a minute

They are here so that the tests need no libtpu. Made with jax 0.10.2 and libtpu 0.0.52; `hlo_threads_older.txt.gz` is
`threads` of libtpu 0.0.42.1, the one that jax 0.10.2 asks for, which writes a thread in another way.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5like.plan import compile as compiler

HERE = Path(__file__).parent


def mesh_of(name: str, sides: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return Mesh(np.array(devices).reshape(sides), axes)


def array(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def loops(mesh: Mesh):
    """3 x 5 times [128, 512] @ [512, 512] a device; rows split 8 ways, so that nothing is exchanged."""

    def step(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=5)[0] + 1, None)
        return jax.lax.scan(outer, x, None, length=3)[0]

    return jax.jit(step).lower(array(mesh, (1024, 512), "d", None), array(mesh, (512, 512)))


def gathers(mesh: Mesh):
    """7 layers, each a [1024, 1024] kernel split 8 ways and gathered before its product with [128, 1024]."""

    def step(x, kernels):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    return jax.jit(step, out_shardings=array(mesh, (1,), None).sharding).lower(
        array(mesh, (1024, 1024), "d", None), array(mesh, (7, 1024, 1024), None, "d", None)
    )


def gradient(mesh: Mesh):
    """The gradient of one [1024, 512] kernel from rows split 8 ways: an all-reduce of it, outside of any loop."""

    def step(x, w):
        return jax.grad(lambda w: jnp.sum((x @ w).astype(jnp.float32) ** 2))(w)

    return jax.jit(step, out_shardings=array(mesh, (1, 1)).sharding).lower(
        array(mesh, (4096, 1024), "d", None), array(mesh, (1024, 512))
    )


def batched(mesh: Mesh):
    """Two batched products of 2 rows and 4 heads a device, which a TPU writes as convolutions."""

    def step(q, k, v):
        return jnp.einsum("BNLS,BNSH->BNLH", jnp.tanh(jnp.einsum("BNLH,BNSH->BNLS", q, k)), v)

    rows = array(mesh, (16, 4, 256, 64), "d", None, None, None)
    return jax.jit(step).lower(rows, rows, rows)


def attention(mesh: Mesh):
    """The same with a softmax between them: libtpu puts a kernel of its own in its place."""

    def step(q, k, v):
        scores = jnp.einsum("BNLH,BNSH->BNLS", q, k, preferred_element_type=jnp.float32)
        return jnp.einsum("BNLS,BNSH->BNLH", jax.nn.softmax(scores).astype(v.dtype), v)

    rows = array(mesh, (16, 4, 256, 64), "d", None, None, None)
    return jax.jit(step).lower(rows, rows, rows)


def threads(mesh: Mesh):
    """5 layers, each a [4096, 4096] gradient of 8 times 512 rows, summed by all-reduces on the sparse cores of v5p."""

    def layer(x, w):
        return jnp.tanh(x @ w)

    def step(x, kernels):
        return jax.grad(lambda k: jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, k)[0] ** 2))(kernels)

    whole = array(mesh, (5, 4096, 4096))
    options = {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": True}
    return jax.jit(step, out_shardings=whole.sharding, compiler_options=options).lower(
        array(mesh, (4096, 4096), "d", None), whole
    )


def main() -> None:
    mesh, torus = mesh_of("v5e:2x4", (8,), ("d",)), mesh_of("v5p:2x2x2", (8,), ("d",))
    for probe, devices in (
        *((each, mesh) for each in (loops, gathers, gradient, batched, attention)),
        (threads, torus),
    ):
        _, text = compiler.compile_with_text(probe(devices), "tpu")
        path = HERE / f"hlo_{probe.__name__}.txt.gz"
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(path.name, len(text), path.stat().st_size)
    huge = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T + 1).lower(array(mesh, (2**17, 2**17)))
    try:
        huge.compile()
    except Exception as error:
        (HERE / "out_of_memory.txt").write_text(str(error)[:4000])


if __name__ == "__main__":
    main()
