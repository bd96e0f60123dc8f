"""Where the package's files lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # configs/ stays at the checkout's root for people to edit; an installed package
    # carries a copy, as bert_pretraining/configs.
    package_dir={"": "base", "bert_pretraining.configs": "configs"},
    packages=[*find_packages("base"), "bert_pretraining.configs"],
    package_data={
        "bert_pretraining.configs": ["*/*.toml"],
        "bert_pretraining.bench": ["wikipedia_lengths.json"],
        "bert_pretraining.preparation": ["mini_start.pt", "checksums/*.chk"],
    },
)
