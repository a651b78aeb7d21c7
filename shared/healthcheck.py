"""Asks this machine's /readyz: the health check of a container, which needs no curl and starts fast."""

import http.client
import sys


def check(port: int, *, timeout_seconds: float = 4.0) -> bool:
    """Tell whether the service is ready, and print its answer, which names what is away."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        print(answer.read().decode())
        return answer.status == 200
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer on port {port}: {error}")
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if check(int(sys.argv[1])) else 1)
