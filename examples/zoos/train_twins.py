"""Train the zoos of the paper's tables, or find them in the data home: ``make zoos``.

Small twins of the paper's zoos, which a CPU trains; see docs/zoos.md. What an interrupted run has
trained is used by the next.

    python examples/zoos/train_twins.py --n-jobs 2
"""

import argparse
import resource
import time

from joblib.externals.loky import get_reusable_executor

from sklora import datasets

# A rank, and the number of adapters if it is not the fetcher's own.
ZOOS = {
    "digits": [(4, None), (32, None)],
    "varied_digits": [(4, None), *((rank, 1000) for rank in (1, 2, 8, 16, 32))],
    "code": [(4, None)],
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-home", help="where zoos are kept; see sklora.datasets")
    parser.add_argument("--n-jobs", type=int, default=-1, help="processes; default: all processors")
    parser.add_argument("--n-adapters", type=int, help="of every zoo; see the fetchers for theirs")
    args = parser.parse_args(argv)
    print(f"{'zoo':15}{'rank':>6}{'adapters':>10}{'numbers each':>14}{'MB':>6}{'s':>7}")
    for name, members in ZOOS.items():
        fetch = getattr(datasets, f"fetch_{name}_loras")
        for rank, n_adapters in members:
            n_adapters = args.n_adapters or n_adapters
            size = {} if n_adapters is None else {"n_adapters": n_adapters}
            started = time.perf_counter()
            X = fetch(rank, data_home=args.data_home, n_jobs=args.n_jobs, **size).data
            seconds = time.perf_counter() - started
            n_adapters, width = X.shape
            print(
                f"{name:15}{rank:6}{n_adapters:10}{width:14}{X.nbytes / 1e6:6.0f}{seconds:7.0f}",
                flush=True,
            )
    get_reusable_executor().shutdown(wait=True)  # children are counted once they have ended
    own, child = (
        resource.getrusage(who).ru_maxrss * 1024 / 1e9
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"at most {own:.2f} GB in this process, {child:.2f} GB in each other")


if __name__ == "__main__":
    main()
