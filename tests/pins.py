"""Writes constraints.txt: the exact version of every package installed, sparklab and pip's own tools left out."""

import importlib.metadata

OWN = {"sparklab", "pip", "setuptools", "wheel"}

if __name__ == "__main__":
    print("# The versions everything is tested with; written by `make pins`. torch 2.13.0: its default wheel is CUDA 13.0, which matches bitsandbytes.")
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version.split("+")[0] for d in importlib.metadata.distributions()}
    for name in sorted(set(found) - OWN):
        print(f"{name}=={found[name]}")
