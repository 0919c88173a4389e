"""The variables of the operator's environment that are passed on to Ray workers."""

from __future__ import annotations

import os

_PREFIXES = ("HF_", "HUGGING_FACE_", "VLLM_", "TRANSFORMERS_", "OMP_", "CUDA_DEVICE_ORDER")

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""Proxy variables, in upper or lower case."""

CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables with the paths of trusted certificates."""


def forwarded_environment() -> dict[str, str]:
    """Return the variables that Ray workers need to load models as in the operator's shell.

    Proxy variables are included in every spelling, since programs read different ones.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) or name.upper() in PROXY_VARIABLES or name in CERTIFICATE_VARIABLES
    }
