"""What an error of S3 means: the user's mistake, an object that is not there, or trouble that may pass."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

import urllib3
from botocore.client import BaseClient
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSOError,
    TokenRetrievalError,
)

from diffussm.errors import UserError

PASSING_STATUS = {408, 429, 500, 502, 503, 504}
PASSING_CODES = {
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
    "TooManyRequestsException", "RequestLimitExceeded", "OperationAborted", "ConditionalRequestConflict",
    "InvalidRange",  # of what an earlier answer said is there
}  # fmt: skip
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidTokenId"}
BAD_NAME = "this cannot be the name of a bucket or an object: look at the URL"
BAD_REGION = "the bucket is of another region: look at AWS_REGION"
ADVICE = {  # by the code of a refusal
    "InvalidAccessKeyId": "the server does not know the access key: look at AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key: look at AWS_SECRET_ACCESS_KEY or "
    "AWS_PROFILE",
    "InvalidToken": "the session token is not valid: look at AWS_SESSION_TOKEN, and unset it if the keys need none",
    "InvalidTokenId": "the session token is not valid: look at AWS_SESSION_TOKEN, and unset it if the keys need none",
    "AccessDenied": "access is denied: have s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket allowed for "
    "these credentials, or choose others by AWS_PROFILE",
    "NoSuchBucket": "there is no such bucket: create it, or look at its name and AWS_ENDPOINT_URL",
    "InvalidBucketName": BAD_NAME,
    "KeyTooLongError": BAD_NAME,
    "AuthorizationHeaderMalformed": BAD_REGION,
    "PermanentRedirect": BAD_REGION,
    "IllegalLocationConstraintException": BAD_REGION,
    "NoSuchUpload": "somebody else has ended this upload: look at the bucket's rules about unfinished ones",
}
CREDENTIAL_ERRORS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
    ProfileNotFound,
    SSOError,
)
REQUEST_ERRORS = (BotoCoreError, ClientError, urllib3.exceptions.HTTPError)


class Incomplete(Exception):
    """An answer that is not all of what was asked for."""


class Refused(UserError):
    """The server has answered, and will not do it."""


class Changed(UserError):
    """The object is another version than the one that was asked for."""


class Expired(Exception):
    """The credentials have run out, or cannot be had just now: try with new ones."""


def code_of(error: Exception) -> str:
    """The S3 error code of an answer, such as NoSuchKey; "" where there was no answer."""
    return error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""


def trouble(error: Exception, url: str, client: BaseClient | None, worked: bool) -> str:
    """What has happened, in words, if it may pass; else this raises what the caller of the store is to see.

    No text of the server's or of a library's gets into a message: it could hold keys.

    Args:
        url: of the object.
        client: that was asked; None where it could not be made.
        worked: something has been answered before. What is hopeless at first is then trouble that may pass: a name
            that nobody resolves, or no credentials.

    Raises:
        FileNotFoundError: there is no such object.
        FileExistsError: there is one, against the condition.
        Expired: new credentials may help.
        UserError: trying again cannot help; Refused, if the server says so.
    """
    if isinstance(error, Incomplete):
        return str(error)
    if isinstance(error, ClientError):
        return _refusal(error, url, worked)
    if isinstance(error, CREDENTIAL_ERRORS):
        problem = _credential_problem(error)
        if worked:
            raise Expired(problem) from error
        raise UserError(f"{url}: {problem}") from error
    if isinstance(error, ParamValidationError):
        raise UserError(f"{url}: {BAD_NAME}") from error
    host = urlsplit(client.meta.endpoint_url).netloc.rpartition("@")[2] if client else "the server"
    if isinstance(error, ConnectTimeoutError):
        return f"no connection to {host} in time"
    if isinstance(error, ReadTimeoutError | urllib3.exceptions.ReadTimeoutError):
        return f"{host} fell silent"
    if isinstance(error, ConnectionError | HTTPClientError | urllib3.exceptions.HTTPError):
        return _connection_problem(error, url, host, worked)
    raise UserError(f"{url}: the AWS settings do not fit each other ({type(error).__name__}): look at them") from error


def _refusal(error: ClientError, url: str, worked: bool) -> str:
    code = code_of(error)
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    if code in ("NoSuchKey", "404"):
        raise FileNotFoundError(errno.ENOENT, "No such object", url) from error
    if status == 412:
        raise FileExistsError(errno.EEXIST, "Object exists", url) from error
    if code in EXPIRED_CODES:
        raise Expired(f"the credentials have expired ({code}): renew them") from error
    if code == "RequestTimeTooSkewed":
        return "the clocks of this machine and the server differ: set this machine's"
    if code in PASSING_CODES or status in PASSING_STATUS:
        return f"the server answered {status} {code}"
    advice = ADVICE.get(code) or (ADVICE["AccessDenied"] if status == 403 else f"the server refuses: {status} {code}")
    if worked and code in KEY_CODES:
        raise Expired(advice) from error
    raise Refused(f"{url}: {advice}") from error


def _connection_problem(error: Exception, url: str, host: str, worked: bool) -> str:
    reasons = [cause for cause in _chain(error) if isinstance(cause, OSError) and cause.strerror]
    for reason in reasons if not worked else []:
        if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
            raise UserError(f"{url}: there is no host {host}: look at AWS_ENDPOINT_URL and AWS_REGION") from error
        if isinstance(reason, ssl.SSLCertVerificationError) or getattr(reason, "reason", "") == "WRONG_VERSION_NUMBER":
            raise UserError(
                f"{url}: no encrypted connection to {host}: look at AWS_ENDPOINT_URL (http or https) and AWS_CA_BUNDLE"
            ) from error
    return f"no connection to {host}: {reasons[0].strerror}" if reasons else f"{host} closed the connection"


def _credential_problem(error: Exception) -> str:
    if isinstance(error, ProfileNotFound):
        return f"there is no profile {os.environ.get('AWS_PROFILE', '')!r} in ~/.aws: look at AWS_PROFILE"
    if isinstance(error, NoCredentialsError):
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PartialCredentialsError):
        return "the credentials are incomplete: set AWS_SECRET_ACCESS_KEY, or complete the profile in ~/.aws"
    return "the credentials' provider fails: sign in again (aws sso login), or look at the profile in ~/.aws"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
