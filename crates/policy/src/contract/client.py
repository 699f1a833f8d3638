"""One request to a policy server with openpi's own client, which needs typing_extensions without
saying so: pip install openpi-client typing_extensions
"""

import numpy as np
from openpi_client import websocket_client_policy

# With keys on the server, add: api_key="KEY".
policy = websocket_client_policy.WebsocketClientPolicy(host="localhost", port=8000)
observation = @OBSERVATION@
actions = policy.infer(observation)["actions"]  # @MEANING@
print(actions.shape, actions[0])
