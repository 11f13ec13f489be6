"""The long description on PyPI: README.md with absolute links. Everything else is in setup.cfg."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/cxr-diffusers/cxr_diffusers"


def with_absolute_links(text):
    """Markdown whose relative links lead to the repository: images to the raw file, all others to its page."""
    images = f"{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/main/"
    text = re.sub(r"(!\[[^\]]*\]\()(?![\w+.-]+:|#)", rf"\1{images}", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![\w+.-]+:|#)", rf"\1{REPOSITORY}/blob/main/", text)


setup(long_description=with_absolute_links(Path(__file__).with_name("README.md").read_text(encoding="utf-8")))
