"""Where the package's files lie, and how they are installed; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.install import install


class InstallThisPackageOnly(install):
    """`python3 setup.py install` that fetches nothing.

    By default it calls easy_install, which fetches dependencies and puts them before the packages
    that are there, such as a vendor's numpy.
    """

    def initialize_options(self) -> None:
        super().initialize_options()
        self.old_and_unmanageable = True  # setuptools' name for: as distutils does


# bert_pretraining.egg-info lies here, not in base/: PYTHONPATH=base would make pip take it for the
# installed package, and then `pip uninstall` does not find the real one.
Path(__file__).with_name("build").mkdir(exist_ok=True)

setup(
    # configs/ stays at the checkout's root for people to edit; an installed package
    # carries a copy, as bert_pretraining/configs.
    package_dir={"": "base", "bert_pretraining.configs": "configs"},
    packages=[*find_packages("base"), "bert_pretraining.configs"],
    package_data={
        "bert_pretraining.configs": ["*/*.toml"],
        "bert_pretraining.bench": ["wikipedia_lengths.json"],
        "bert_pretraining.qualify": ["published.toml"],
        "bert_pretraining.scaling": ["devices.toml"],
        "bert_pretraining.preparation": ["mini_start.pt", "checksums/*.chk"],
    },
    cmdclass={"install": InstallThisPackageOnly},
    options={"egg_info": {"egg_base": "build"}},
)
