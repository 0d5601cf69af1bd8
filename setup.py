"""Installs adiff from settings.ini, the one place that names version, requirements and commands."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
# What of nbs/ ships with the package, below adiff/lab in a wheel (adiff.lab.matrix.shipped finds it there or in nbs/).
shipped = ["experiments/*.ipynb", "experiments/published.csv", "experiments/matrices/*.yaml",
           "_site/style.css", "_site/runs.js"]
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]


class WithExperiments(build_py):
    "Also copies what the lab runs and shows into the wheel; nbs/ stays its only place in the repository."

    def files(self):
        return [path for pattern in shipped for path in sorted((here / "nbs").glob(pattern))]

    def run(self):
        super().run()
        for path in [] if self.editable_mode else self.files():
            target = Path(self.build_lib, "adiff/lab", path.relative_to(here / "nbs"))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def get_source_files(self):  # what a source distribution holds
        return [*super().get_source_files(), "settings.ini", *(str(path.relative_to(here)) for path in self.files())]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
    ],
    cmdclass={"build_py": WithExperiments},
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    package_data={settings["lib_path"]: ["py.typed"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): settings[key].split() for key in settings
                    if key.endswith("_requirements")},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
)
