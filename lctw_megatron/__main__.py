"""`python -m lctw_megatron`: the versions and what this machine can do, for a bug report."""

from lctw_megatron.platform.capabilities import capabilities

if __name__ == "__main__":
    print("\n".join(capabilities().parts()))
