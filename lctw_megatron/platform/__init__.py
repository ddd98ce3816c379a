"""Where megatron-core meets the machine: devices, backends, CPU."""
