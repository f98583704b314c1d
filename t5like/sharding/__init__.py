"""Device meshes, the sharding of arrays over them, and the compiler options of each chip."""
