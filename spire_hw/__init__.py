"""The library: SPIFFE values, devices, transport and the plugin framework."""

from typing import Final

__version__: Final = "0.1.0"
