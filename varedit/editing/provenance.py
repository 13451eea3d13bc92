"""Content credentials (C2PA): a signed statement in the file that the picture was edited by AI, and how.

Any program that knows C2PA can check who signed it and that nothing was changed since. The manifest of `manifest`
stays beside it, so a signed file can still be replayed. Needs the package c2pa-python; nothing is sent anywhere.
"""

import io
import json
from pathlib import Path
from typing import Any

from varedit import __version__
from varedit.durable import write_durably
from varedit.editing.manifest import SOURCE_TYPE, Manifest, picture_sha256, read_manifest
from varedit.image_processor import load_image
from varedit.image_writer import check_output, writing

FORMATS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
"""Suffix -> media type of files that hold their own manifest."""

INPUT_LABEL = "input"


def sign(
    file: Path, output: Path, certificate: Path, key: Path, *, source: Path | None = None, overwrite: bool = False
) -> None:
    """Write an edited picture with a signed C2PA manifest; pixels and varedit's own manifest stay as they are.

    Args:
        file: PNG, JPEG or WebP that `varedit edit` wrote.
        output: of the same format; may be `file` itself if `overwrite`.
        certificate: PEM, the signer's certificate first, then those it hangs on.
        key: PEM, the signer's private key without a password: EC (P-256, P-384, P-521), RSA or Ed25519.
        source: the picture that was edited. It becomes the parent in the picture's history, with the credentials that
            it brings along, such as a camera's; without it the history begins with the edit.

    Raises:
        ValueError: c2pa-python is missing, the file has no manifest or another format, `source` is not what was
            edited, the key and the certificate cannot sign, or the output cannot be written.
    """
    try:
        import c2pa
    except ImportError:
        raise ValueError("content credentials need the package c2pa-python; pip install c2pa-python") from None
    media = _media_type(file)
    if _media_type(output) != media:
        raise ValueError(f"output {str(output)!r} has another format than {str(file)!r}; give it the same suffix")
    check_output(output, overwrite=overwrite)
    manifest = read_manifest(file)
    if manifest is None:
        raise ValueError(f"{str(file)!r} does not say how it was made; sign what varedit edit wrote with its manifest")
    builder = c2pa.Builder(json.dumps(_statement(file, manifest, source is not None)))
    if source is not None:
        _check_source(source, manifest)
        ingredient = {"title": source.name, "relationship": "parentOf", "label": INPUT_LABEL}
        try:
            builder.add_ingredient(json.dumps(ingredient), _media_type(source), io.BytesIO(source.read_bytes()))
        except c2pa.C2paError as error:
            raise ValueError(f"{str(source)!r} cannot be the parent ({error}); leave --input out") from error
    signed = io.BytesIO()
    try:
        info = c2pa.C2paSignerInfo(_algorithm(key), _pem(certificate), _pem(key), None)
        builder.sign(c2pa.Signer.from_info(info), media, io.BytesIO(file.read_bytes()), signed)
    except c2pa.C2paError as error:
        raise ValueError(f"certificate {str(certificate)!r} and key {str(key)!r} cannot sign: {error}") from error
    with writing(output):
        write_durably(output, signed.getvalue())


def _statement(file: Path, manifest: Manifest, has_parent: bool) -> dict[str, Any]:
    """The C2PA manifest to be signed: what was done, with what, and where the picture comes from."""
    edit = {
        "action": "c2pa.edited" if has_parent else "c2pa.created",
        "digitalSourceType": SOURCE_TYPE,
        "softwareAgent": {"name": "varedit", "version": __version__},
        "description": f"edited by AI: {manifest.instruction}",
        "parameters": {
            "instruction": manifest.instruction,
            "seed": str(manifest.seed),
            "model_sha256": manifest.model["sha256"],
        },
    }
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [INPUT_LABEL]}}
    actions = [opened, edit] if has_parent else [edit]
    return {
        "title": file.name,
        "claim_generator_info": [{"name": "varedit", "version": __version__}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }


def _check_source(source: Path, manifest: Manifest) -> None:
    """Raises ValueError if `source` is not the picture that was edited."""
    loaded = load_image(source)
    found = picture_sha256(loaded.rgb, loaded.rgb16_HW3)
    if found["sha256"] != manifest.input["sha256"]:
        raise ValueError(f"{str(source)!r} is not the picture that was edited; name that one, or leave --input out")


def _media_type(file: Path) -> str:
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"{str(file)!r} is none of {', '.join(FORMATS)}, which can hold content credentials")
    return FORMATS[file.suffix.lower()]


def _pem(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); name a PEM file") from error
    if b"-----BEGIN" not in data:
        raise ValueError(f"{str(path)!r} is no PEM file (-----BEGIN ...)")
    return data


def _algorithm(key: Path) -> bytes:
    """C2PA's name of the signature that a private key makes."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(_pem(key), None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"key {str(key)!r} is no private key without a password ({error})") from error
    curves = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}
    if isinstance(found, ec.EllipticCurvePrivateKey) and found.curve.name in curves:
        return curves[found.curve.name]
    if isinstance(found, rsa.RSAPrivateKey):
        return b"ps256"
    if isinstance(found, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    raise ValueError(f"key {str(key)!r} is of a kind that C2PA does not know; use EC P-256, RSA or Ed25519")
