"""One page that shows a run or a folder of pictures: a single file, without a server, a network or a build step."""
