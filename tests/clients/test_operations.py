"""openpi's own client, as published, through TLS and with keys, against the null server."""

import os
import pathlib
import ssl
import tempfile
import time
import unittest
from unittest import mock

import websockets.exceptions
from openpi_client import websocket_client_policy
from test_openpi_client import Server, observation

TLS = pathlib.Path(__file__).parents[2] / "testdata" / "tls"
FLAGS = ("--times", "1", "--tls-cert", str(TLS / "first.pem"), "--tls-key", str(TLS / "first.key"))


class Tls(unittest.TestCase):
    """A host that starts with `ws` is taken as it is, and the authority comes from the system."""

    def client(self, server: Server, **options):
        return websocket_client_policy.WebsocketClientPolicy(
            host="wss://localhost", port=server.port, **options
        )

    def test_an_unmodified_client(self):
        with Server(*FLAGS) as server, mock.patch.dict(
            os.environ, {"SSL_CERT_FILE": str(TLS / "ca.pem")}
        ):
            client = self.client(server)
            self.assertEqual(client.get_server_metadata(), {"policy": "null"})
            for i in range(20):
                self.assertEqual(client.infer(observation(i))["actions"].shape, (50, 8))

    def test_with_keys_on_top(self):
        with tempfile.TemporaryDirectory() as folder:
            keys = pathlib.Path(folder, "keys")
            keys.write_text("key-of-the-first-robot\n")
            with Server(*FLAGS, "--api-key-file", str(keys)) as server, mock.patch.dict(
                os.environ, {"SSL_CERT_FILE": str(TLS / "ca.pem")}
            ):
                self.client(server, api_key="key-of-the-first-robot").infer(observation())
                with self.assertRaises(websockets.exceptions.InvalidStatus) as refused:
                    self.client(server)
                self.assertEqual(refused.exception.response.status_code, 401)

    def test_an_unknown_authority_is_the_clients_to_refuse(self):
        with Server(*FLAGS) as server, mock.patch.dict(
            os.environ, {"SSL_CERT_FILE": str(TLS / "second.pem")}
        ):
            with self.assertRaises(ssl.SSLCertVerificationError):
                self.client(server)


class Keys(unittest.TestCase):
    def test_a_quota_is_told_and_a_revoked_key_ends_the_connection(self):
        with tempfile.TemporaryDirectory() as folder:
            keys = pathlib.Path(folder, "keys")
            keys.write_text("arm key-of-the-first-robot rate=4 burst=2\n")
            flags = ("--times", "1", "--api-key-file", str(keys), "--reload-ms", "50")
            with Server(*flags) as server:
                client = server.client(api_key="key-of-the-first-robot")
                with self.assertRaisesRegex(RuntimeError, "key `arm` may send 4 requests a second"):
                    for i in range(1000):
                        client.infer(observation(i, side=8))
                # The socket is open, and in a quarter of a second there is room for one more.
                time.sleep(0.3)
                client.infer(observation())
                keys.write_text("leg key-of-the-last-robot\n")
                with self.assertRaises(websockets.exceptions.ConnectionClosed) as closed:
                    for _ in range(1000):
                        time.sleep(0.3)
                        client.infer(observation())
                self.assertEqual(closed.exception.rcvd.code, 1008)


if __name__ == "__main__":
    unittest.main()
