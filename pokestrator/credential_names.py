"""Which names a credential may have. It becomes a variable of that name in the environment of an agent's run.

A name that the service reads its settings from, or that tells a process how to start, is refused: a credential must
neither stand in for one of our secrets nor change what the agent's processes do.
"""

from __future__ import annotations

import re

from pokestrator.settings import setting_names

PATTERN = r"^[A-Z][A-Z0-9_]{1,63}$"

# What shells, the dynamic linker, language runtimes, TLS libraries, Git and the Claude CLI obey.
_PROCESS_NAMES = frozenset(
    {
        *("PATH", "HOME", "PWD", "OLDPWD", "SHELL", "SHLVL", "USER", "LOGNAME", "HOSTNAME", "TERM", "MAIL"),
        *("TMPDIR", "TMP", "TEMP", "LANG", "LANGUAGE", "TZ", "TZDIR", "IFS", "ENV", "CDPATH", "PROMPT_COMMAND"),
        *("EDITOR", "VISUAL", "PAGER", "BROWSER", "LESSOPEN", "LESSCLOSE", "GCONV_PATH", "LOCPATH", "NLSPATH"),
        *("HOSTALIASES", "LOCALDOMAIN", "RES_OPTIONS", "NETRC", "WGETRC", "CURL_HOME", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PERL5LIB"),
        *("PERL5OPT", "PERL5DB", "RUBYOPT", "RUBYLIB", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH"),
        *("API_TIMEOUT_MS", "MAX_THINKING_TOKENS"),
    }
)
_PROCESS_PREFIXES = (
    *("LD_", "DYLD_", "LC_", "GLIBC_", "MALLOC_", "BASH", "ZSH", "XDG_", "PYTHON", "PIP_", "NODE_", "NPM_CONFIG_"),
    *("BUN_", "GIT_SSH", "GIT_CONFIG", "GIT_EXEC", "GIT_ASKPASS", "GIT_PROXY", "SSH_ASKPASS", "OPENSSL_", "OTEL_"),
    *("CLAUDE", "ANTHROPIC", "DISABLE_", "POKE_", "POKESTRATOR_"),
)


def check_credential_name(name: str) -> str:
    """`name`, if a credential may have it. Raises ValueError with the reason; that repeats no name of a wrong form,
    because it can be the secret itself, put in the wrong place."""
    if not re.fullmatch(PATTERN, name):
        raise ValueError("a credential's name is 2 to 64 capital letters, digits and _, such as STRIPE_API_KEY")
    is_process_name = name in _PROCESS_NAMES or name.startswith(_PROCESS_PREFIXES) or name.endswith("_PROXY")
    if is_process_name or name in setting_names():
        raise ValueError(f"{name} means something to this service or to the processes of an agent; take another name")
    return name
