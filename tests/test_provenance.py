"""Content credentials: signed by a certificate made here, read back by the C2PA library itself."""

import datetime
import json

import numpy as np
import pytest
from PIL import Image

from varedit.editing.manifest import read_manifest
from varedit.image_processor import load_image

c2pa = pytest.importorskip("c2pa")


def pem_files(folder, make_key):
    """A certificate chain and a key as the C2PA standard wants them."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    now = datetime.datetime.now(datetime.UTC)
    oids = x509.NameOID.ORGANIZATION_NAME, x509.NameOID.COMMON_NAME

    def certificate(name, key, issuer, issuer_key, is_authority):
        names = [x509.Name([x509.NameAttribute(*pair) for pair in zip(oids, ("Test", n))]) for n in (name, issuer)]
        usage = x509.KeyUsage(not is_authority, *[False] * 4, is_authority, is_authority, False, False)
        builder = (
            x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=9))
            .add_extension(x509.BasicConstraints(is_authority, None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
            .add_extension(usage, True)
        )
        if not is_authority:
            builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        return builder.sign(issuer_key, hashes.SHA256())

    authority, key = ec.generate_private_key(ec.SECP256R1()), make_key()
    chain = [
        certificate("signer", key, "root", authority, False),
        certificate("root", authority, "root", authority, True),
    ]
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "chain.pem").write_bytes(b"".join(one.public_bytes(pem) for one in chain))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    return ["--certificate", folder / "chain.pem", "--key", folder / "key.pem"]


@pytest.fixture
def signer(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec

    return pem_files(tmp_path, lambda: ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def edited(varedit, model_folder, tmp_path):
    """Edits a picture on a tiny model; returns the file of the given name."""
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")

    def edit(name):
        model = ["--model", model_folder, "--device=cpu"]
        assert varedit("edit", tmp_path / "photo.png", "blur", "--seed=3", "-o", tmp_path / name, *model).code == 0
        return tmp_path / name

    return edit


def actions(path):
    """The state that the C2PA library finds a file in, and the actions of its manifest."""
    with c2pa.Reader(path) as reader:
        found = json.loads(reader.json())
    (assertion,) = [
        one for one in found["manifests"][found["active_manifest"]]["assertions"] if one["label"] == "c2pa.actions.v2"
    ]
    return found["validation_state"], found["manifests"][found["active_manifest"]], assertion["data"]["actions"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_signed_file_is_valid_and_still_the_same_edit(varedit, edited, signer, tmp_path, suffix):
    file, signed = edited(f"edited.{suffix}"), tmp_path / f"signed.{suffix}"
    before = file.read_bytes()
    ran = varedit("sign", file, "-o", signed, *signer)
    assert ran.code == 0 and "signed" in ran.out and file.read_bytes() == before
    state, _, (action,) = actions(signed)
    assert state == "Valid" and action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    manifest = read_manifest(signed)
    assert manifest == read_manifest(file) and action["parameters"]["instruction"] == manifest.instruction == "blur"
    assert np.array_equal(load_image(signed).rgb, load_image(file).rgb)
    data = bytearray(signed.read_bytes())
    data[60 if suffix == "webp" else -40] ^= 1  # one bit of the picture
    signed.write_bytes(data)
    assert actions(signed)[0] == "Invalid"


def test_the_input_is_the_parent_in_the_history(varedit, edited, signer, tmp_path):
    file = edited("edited.png")
    assert varedit("sign", file, "--input", tmp_path / "photo.png", "--overwrite", *signer).code == 0
    state, manifest, (opened, action) = actions(file)
    assert state == "Valid" and (opened["action"], action["action"]) == ("c2pa.opened", "c2pa.edited")
    (parent,) = manifest["ingredients"]
    assert (parent["title"], parent["relationship"]) == ("photo.png", "parentOf")


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_other_kinds_of_keys_sign(varedit, edited, tmp_path, kind):
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    makers = {"rsa": lambda: rsa.generate_private_key(65537, 2048), "ed25519": ed25519.Ed25519PrivateKey.generate}
    file = edited("edited.png")
    assert varedit("sign", file, "--overwrite", *pem_files(tmp_path, makers[kind])).code == 0
    assert actions(file)[0] == "Valid"


def test_a_full_disk_leaves_the_unsigned_file(varedit, edited, signer, monkeypatch):
    file = edited("edited.png")
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    varedit("sign", file, "--overwrite", *signer).assert_refused("edited.png", "No space left")
    assert file.read_bytes() == before


def test_what_cannot_be_signed_is_refused_and_left_alone(varedit, edited, signer, tmp_path):
    file = edited("edited.png")
    before = file.read_bytes()
    varedit("sign", file, *signer).assert_refused("exists already", "--overwrite")
    varedit("sign", file, "-o", tmp_path / "signed.jpg", *signer).assert_refused("signed.jpg", "another format")
    varedit("sign", tmp_path / "photo.png", "--overwrite", *signer).assert_refused("photo.png", "how it was made")
    Image.new("RGB", (90, 60)).save(tmp_path / "other.png")
    other = ["--input", tmp_path / "other.png"]
    varedit("sign", file, "--overwrite", *other, *signer).assert_refused("other.png", "not the picture that was edited")
    varedit("sign", tmp_path / "none.tiff", *signer).assert_refused("none.tiff", ".png")
    swapped = ["--certificate", tmp_path / "key.pem", "--key", tmp_path / "chain.pem"]
    varedit("sign", file, "--overwrite", *swapped).assert_refused("chain.pem", "no private key")
    missing = ["--certificate", tmp_path / "none.pem", "--key", tmp_path / "key.pem"]
    varedit("sign", file, "--overwrite", *missing).assert_refused("none.pem", "PEM")
    (tmp_path / "words.pem").write_text("hello")
    words = ["--certificate", tmp_path / "words.pem", "--key", tmp_path / "key.pem"]
    varedit("sign", file, "--overwrite", *words).assert_refused("words.pem", "no PEM file")
    wrong = ["--certificate", tmp_path / "key.pem", "--key", tmp_path / "key.pem"]
    varedit("sign", file, "--overwrite", *wrong).assert_refused("key.pem", "cannot sign")
    assert file.read_bytes() == before
