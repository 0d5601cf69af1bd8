"""Makes the small demo dataset from photographs in scikit-image: python data_scripts/demo.py --out data/demo"""
import argparse
import sys

from adiff.core import InputError
from adiff.data.demo_images import make_demo_data


def main():
    "0 when the dataset is there; 2 with one line on standard error when it cannot be made."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/demo", help="folder to make (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other tiles and defects (default: 0)")
    arguments = parser.parse_args()
    try:
        print(f"{make_demo_data(arguments.out, arguments.seed)}: complete")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
