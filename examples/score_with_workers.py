"""Score once, with several processes and a folder for finished scores, and then try several budgets.

With a permanent folder, an interrupted run resumes when it is started again. For a cluster, pass a Dask executor:
``executor=distributed.Client("scheduler:8786").get_executor()`` (``pip install "infoq-fx[dask]"``).
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor

import infoq_fx
from infoq_fx.demo import digits, train_digits_net


def main() -> None:
    (images, labels), _ = digits()
    model = train_digits_net(images, labels, epochs=2)
    data = images[:256], labels[:256]
    prepared = infoq_fx.prepare(model, data, bits=(2, 3, 4, 8))
    with (
        tempfile.TemporaryDirectory() as folder,  # use a permanent folder to resume and reuse scores
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor,
    ):
        table = infoq_fx.score(prepared, data, executor=executor, cache_dir=folder, progress=False)
        # All scores are read from the folder; nothing is measured again.
        assert infoq_fx.score(prepared, data, cache_dir=folder, progress=False) == table
    for mean_bits in (6, 5, 4, 3):
        allocation = infoq_fx.allocate(table, mean_bits)
        print(f"a mean of {mean_bits} bits: score {allocation.score:.3g}, uniform {allocation.uniform_score or 0:.3g}")


if __name__ == "__main__":
    main()
