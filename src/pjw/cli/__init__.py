"""What a person types: `pjw list | get | start | stop | logs`. Knows neither server nor worker."""
