"""How a worker talks to the other parts."""

from common.network.peers import Peers, only_local
from common.security.security_config import SettingsError
from common.worker.config import WorkerConfig


def worker_peers(config: WorkerConfig) -> Peers:
    """`Peers.of`, for a worker, which other machines must not reach without proof that they are routers.

    Raises:
        SettingsError: as `Peers.of`, or because the worker would listen for other machines without a secret or
            certificates.
    """
    proof = config.cluster_secret_file or config.tls_client_ca
    if not (proof or config.insecure or only_local(config.listen)):
        raise SettingsError(
            f"whoever reaches {config.listen} could run prompts on this worker: set --cluster-secret-file (or "
            "--tls-cert, --tls-key and --tls-client-ca) here and on the routers, listen on 127.0.0.1, or, on a "
            "network where only routers and workers are, set --insecure"
        )
    return Peers.of(config)
