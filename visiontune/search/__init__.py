"""Search over pictures by a reward, one method a file: more is drawn than is kept, and the reward says what."""
