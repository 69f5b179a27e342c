"""The command line: `pjw list | get | start | stop | logs`. Knows neither server nor worker."""
