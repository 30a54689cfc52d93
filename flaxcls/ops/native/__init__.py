"""Native operators for CPU, in C++ behind `jax.ffi`; what they need to run is asked in `build`."""
