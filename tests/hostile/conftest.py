"""How many cases hypothesis makes: few and always the same ones in `make test`, many others in `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=10, derandomize=True, **COMMON)
settings.register_profile("many", max_examples=500, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HOSTILE_CASES", "few"))
