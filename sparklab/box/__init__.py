"""What the machine has: profiles, detection, the live meter. Standard library only; nothing is probed at import."""

from sparklab.box.box import Box

__all__ = ["Box"]
