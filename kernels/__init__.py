"""Triton kernels, imported as `fastcpt.kernels`. A leaf: torch and triton only. Nothing is imported here (see pyproject)."""
