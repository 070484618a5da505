"""Brokers behind TLS with an authority of one's own: feeds and predictions reach those that are trusted alone."""

import asyncio
import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from brokers import JARS, JAVA, MOSQUITTO, PROPERTIES, Broker
from stack import taken

from runners.feeds.stream import unreachable
from runners.predictions import KINDS
from runners.settings import Configuration, load
from streamkd.config import make
from streamkd.errors import FeedError

trustme = pytest.importorskip("trustme", reason="pip install 'streamkd[test]'")

from cryptography.hazmat.primitives import serialization  # noqa: E402 - it comes with trustme

RECORDS = 20
LINES = [json.dumps({"a": number, "y": str(number % 2)}) for number in range(RECORDS)]
HOST = "127.0.0.1"
PASSWORD = "open sesame"  # noqa: S105 - nobody's


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's certificate, and a server's certificate and key, by themselves and in one file."""
    folder, authority = tmp_path_factory.mktemp("papers"), trustme.CA()
    issued = authority.issue_cert(HOST)
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    (folder / "server.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (folder / "both.pem").write_bytes((folder / "key.pem").read_bytes() + (folder / "server.pem").read_bytes())
    authority.cert_pem.write_to_path(folder / "authority.pem")
    return folder


@dataclass(frozen=True)
class Place:
    """A broker behind TLS.

    Attributes:
        broker: it.
        settings: of a feed and of predictions alike, the kind first.
        feed, predictions: settings of the two.
        trusting: settings of both by which the authority is named, where it is not the environment that does.
    """

    broker: Broker
    settings: dict[str, Any]
    feed: dict[str, Any]
    predictions: dict[str, Any]
    trusting: dict[str, Any]

    def configuration(self, folder: Path, *, trusted: bool) -> Configuration:
        """Return one whose feed reads what its predictions write."""
        both = self.settings | (self.trusting if trusted else {})
        spool = {"spool": folder / "spool"} if both["kind"] == "mqtt" else {}
        parts = {
            "feed": {**both, **self.feed, **spool, "label": "y", "columns": ["a"]},
            "predictions": both | self.predictions,
        }
        return load("default", (), parts)


def redis_place(papers: Path, folder: Path) -> Place:
    pytest.importorskip("redis")
    papered = ["--tls-cert-file", f"{papers}/server.pem", "--tls-key-file", f"{papers}/key.pem"]
    trusted = ["--tls-ca-cert-file", f"{papers}/authority.pem", "--tls-auth-clients", "no"]
    command = ["redis-server", "--bind", HOST, "--port", "0", "--tls-port", "{port}", *papered, *trusted]
    broker = Broker("redis-server", [*command, "--dir", "{folder}", "--save", ""], folder)
    settings = {"kind": "redis", "url": f"rediss://{HOST}:{broker.port}/0", "stream": "s"}
    return Place(broker, settings, {"format": "json", "field": "data"}, {}, {})


def nats_place(papers: Path, folder: Path) -> Place:
    nats = pytest.importorskip("nats")
    papered = ["--tls", "--tlscert", f"{papers}/server.pem", "--tlskey", f"{papers}/key.pem"]
    broker = Broker(
        "nats-server", ["nats-server", "-a", HOST, "-p", "{port}", "-js", "-sd", "{folder}", *papered], folder
    )
    url = f"tls://{HOST}:{broker.port}"

    async def add() -> None:
        client = await nats.connect(url, tls=ssl.create_default_context(cafile=f"{papers}/authority.pem"))
        await client.jetstream().add_stream(name="s", subjects=["s"])
        await client.close()

    asyncio.run(add())
    return Place(broker, {"kind": "nats", "url": url}, {"stream": "s"}, {"subject": "s"}, {})


def mqtt_place(papers: Path, folder: Path) -> Place:
    pytest.importorskip("paho.mqtt.client")
    papered = f"certfile {papers}/server.pem\nkeyfile {papers}/key.pem\n"
    made = partial(Broker, files={"mosquitto.conf": MOSQUITTO.replace("allow_anonymous", f"{papered}allow_anonymous")})
    broker = made("mosquitto", ["mosquitto", "-c", "{folder}/mosquitto.conf"], folder)
    settings = {"kind": "mqtt", "url": f"mqtts://{HOST}:{broker.port}", "topic": "s"}
    return Place(broker, settings, {"session": "streamkd"}, {}, {})


SECURED = """
listener.security.protocol.map=CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL
inter.broker.listener.name=SASL_SSL
sasl.mechanism.inter.broker.protocol=PLAIN
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
username="me" password="open sesame" user_me="open sesame";
ssl.keystore.type=PEM
ssl.keystore.location={papers}/both.pem
ssl.truststore.type=PEM
ssl.truststore.location={papers}/authority.pem
"""


def kafka_place(papers: Path, folder: Path) -> Place:
    pytest.importorskip("confluent_kafka")
    if not list(Path(JARS).glob("kafka_*.jar")):
        pytest.skip(f"no jars of Kafka in {JARS}")
    properties = PROPERTIES.replace("=PLAINTEXT://", "=SASL_SSL://") + SECURED.replace("{papers}", str(papers))
    file = "{folder}/server.properties"
    broker = Broker(
        "default-jre-headless",
        [*JAVA, "kafka.Kafka", file],
        folder,
        files={"server.properties": properties},
        first=[*JAVA, "kafka.tools.StorageTool", "format", "-t", "U3RyZWFta2QgVGVzdHMhIQ", "-c", file],
    )
    settings = {
        "kind": "kafka",
        "servers": [f"{HOST}:{broker.port}"],
        "topic": "s",
        "user": "me",
        "password_env": "BROKER_PASSWORD",
    }
    trusting = {"client": {"ssl.ca.location": f"{papers}/authority.pem"}}
    return Place(broker, settings, {}, {}, trusting)


PLACES: dict[str, Callable[[Path, Path], Place]] = {
    "redis": redis_place,
    "nats": nats_place,
    "mqtt": mqtt_place,
    "kafka": kafka_place,
}


@pytest.fixture(params=[name if name != "kafka" else pytest.param(name, marks=pytest.mark.slow) for name in PLACES])
def place(
    request: pytest.FixtureRequest, papers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.setenv("BROKER_PASSWORD", PASSWORD)
    made = PLACES[request.param](papers, tmp_path / "broker")
    yield made
    made.broker.stop()


def test_what_is_sent_to_a_trusted_broker_is_read_from_it(
    place: Place, papers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{papers}/authority.pem")
    configuration = place.configuration(tmp_path, trusted=True)
    begun = configuration.open_feed(pytest.fail) if place.settings["kind"] == "mqtt" else None  # a session begins so
    sink = make(configuration.predictions, KINDS, "predictions")
    sink.put(LINES)
    sink.sync()
    feed = begun or configuration.open_feed(pytest.fail)
    assert sorted(value for batch in taken(feed, RECORDS) for value in batch.x[:, 0].tolist()) == list(range(RECORDS))
    feed.close()
    sink.close()


@pytest.mark.filterwarnings(
    "ignore:.*SSLSocket:pytest.PytestUnraisableExceptionWarning"
)  # paho leaves it to the collector
def test_a_broker_that_nobody_vouches_for_is_not_talked_to(place: Place, tmp_path: Path) -> None:
    configuration = place.configuration(tmp_path, trusted=False)
    for opened in (lambda: configuration.open_feed(pytest.fail), configuration.open_predictions):
        with pytest.raises(
            FeedError, match=r"cannot be reached .*certificate verify failed.*(SSL_CERT_FILE|ssl\.ca\.location\" = )"
        ):
            opened()


@pytest.mark.slow
def test_a_login_that_is_refused_is_told(papers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = kafka_place(papers, tmp_path / "broker")
    monkeypatch.setenv("BROKER_PASSWORD", "sesame")
    configuration = place.configuration(tmp_path, trusted=True)
    for opened in (lambda: configuration.open_feed(pytest.fail), configuration.open_predictions):
        with pytest.raises(FeedError, match=r"cannot be reached .*Authentication failed.*; check the user"):
            opened()
    place.broker.stop()


@pytest.mark.parametrize(
    "why",
    [
        "Authentication required.",
        "WRONGPASS invalid username-password pair or user is disabled.",
        "nats: 'Authorization Violation'",
        "Not authorized",
        "Bad user name or password",
    ],
)
def test_what_helps_is_said_in_every_brokers_words(why: str) -> None:
    assert str(unreachable("feed.url", "there", why)).endswith(
        "; check the user, and the password in the environment variable that password_env names"
    )


def test_a_broker_that_lets_nobody_in_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("paho.mqtt.client")
    closed = MOSQUITTO.replace("allow_anonymous true", "allow_anonymous false")
    command = ["mosquitto", "-c", "{folder}/mosquitto.conf"]
    broker = Broker("mosquitto", command, tmp_path / "broker", files={"mosquitto.conf": closed})
    place = Place(broker, {"kind": "mqtt", "url": f"mqtt://{HOST}:{broker.port}", "topic": "s"}, {}, {}, {})
    configuration = place.configuration(tmp_path, trusted=True)
    for opened in (lambda: configuration.open_feed(pytest.fail), configuration.open_predictions):
        with pytest.raises(FeedError, match=r"\(Not authorized\); check the user"):
            opened()
    broker.stop()
