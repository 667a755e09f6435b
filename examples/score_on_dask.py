"""Score on a Dask cluster, with exactly the same scores as on one machine.

Run it:  python examples/score_on_dask.py    (``pip install "infoq-fx[dask]"``)

A Dask client provides a ``concurrent.futures.Executor``, which is all that scoring needs. Here the cluster is two local
processes; for a real one use ``Client("tcp://scheduler:8786")``, with infoq-fx installed on its workers.
"""

import tempfile

from distributed import Client, LocalCluster

import infoq_fx
from infoq_fx.demo import digits, train_digits_net


def main() -> None:
    (images, labels), _ = digits()
    model = train_digits_net(images, labels, epochs=2)
    data = images[:128], labels[:128]
    prepared = infoq_fx.prepare(model, data, bits=(2, 4, 8))
    with (
        tempfile.TemporaryDirectory() as folder,  # use a permanent folder to keep finished scores
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=folder) as cluster,
        Client(cluster) as client,
    ):
        there = infoq_fx.score(prepared, data, executor=client.get_executor(), cache_dir=folder, progress=False)
    here = infoq_fx.score(prepared, data, progress=False)
    assert there == here
    # The scores are small and need no model: save them on the cluster, and allocate on a laptop.
    print(infoq_fx.summarize(infoq_fx.allocate(there, 4.0), there.inventory))


if __name__ == "__main__":
    main()
