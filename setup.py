"""Everything here is read from settings.ini; edit that file, not this one."""
import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
EXTRAS = ("dev", "baselines", "gears", "genes", "hub", "docs")


class WithPages(build_py):
    "The experiment pages travel inside the package, without their outputs; an editable install reads them from nbs/."
    def run(self):
        super().run()
        for page in [] if self.editable_mode else sorted(Path(__file__).parent.glob("nbs/*_exp_*.ipynb")):
            notebook = json.loads(page.read_text(encoding="utf-8"))
            for cell in notebook["cells"]:
                cell |= {"outputs": []} if cell["cell_type"] == "code" else {}
            file = Path(self.build_lib, cfg["lib_name"], "pages", page.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="MIT",
    keywords=cfg["keywords"],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_name"]: ["templates/*/*", "models/*/*"]},
    cmdclass={"build_py": WithPages},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in EXTRAS},
    entry_points={"console_scripts": ["scformer = scformer_nb.cli:app"]},
    zip_safe=False,
)
